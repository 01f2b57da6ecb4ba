"""Before any test: shape and type checks, no network, no torchvision, Hypothesis profiles."""

import os
import sys
from zlib import crc32

# curvlinops depends on BackPACK, which pulls a torchvision that does not match a CPU-only torch; Transformers would
# import it and fail. Nothing here uses it, so it is made unimportable before anything imports Transformers.
sys.modules["torchvision"] = None
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jaxtyping  # noqa: E402 (what is above comes first)
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from jaxtyping import config as type_checks  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from on_device import DEVICE, OnDevice  # noqa: E402

collect_ignore = ["support"]  # helpers, not tests

decorated = jaxtyping.jaxtyped


def decorated_where_checked(**options):
    """The decorator of the import hook, but for functions that a call makes while no types are checked.

    Closures are made anew in every call, and to decorate them took 29 of the 47 s of a profiled pass.
    """

    def decorate(function_or_class):
        made_in_a_call = "<locals>" in function_or_class.__qualname__
        if made_in_a_call and type_checks.jaxtyping_disable:
            return function_or_class
        return decorated(**options)(function_or_class)

    return decorate


jaxtyping.jaxtyped = decorated_where_checked  # what the hook has written at the head of each function

# Not fisherfunc.testing: beartype cannot check against Hypothesis' DrawFn, a protocol not meant for isinstance.
LAYERS = ("records", "linalg", "partitioning", "statistics", "gradients", "operators", "models", "pipeline")
LAYERS += ("surface", "distributed")
install_import_hook([f"fisherfunc.{layer}" for layer in LAYERS], "beartype.beartype")

# Torch's first calls take longer than Hypothesis' default deadline.
SLOW_DRAWS = [HealthCheck.too_slow]
settings.register_profile("dev", deadline=None, max_examples=30, suppress_health_check=SLOW_DRAWS)
settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True, print_blob=True, suppress_health_check=SLOW_DRAWS
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

if DEVICE != "cpu":
    OnDevice().__enter__()

# Tiny models run faster on one thread, above all where the cores are busy; no test may need that.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))

# Checking shapes and types of every call takes much of the processor time of a test of small models (some 8 s instead
# of 3 of gpt2's in gradients/capture/test_segments.py): one test in so many does it, picked by its name and that of
# its file, wherever the file lies; with TEST_TYPES_EVERY=1 all do.
TYPES_EVERY = int(os.environ.get("TEST_TYPES_EVERY", "5"))


def pytest_runtest_setup(item):
    """What a test draws does not depend on which others ran before it in the same process."""
    torch.manual_seed(0)
    name = f"tests/{item.path.name}::{item.nodeid.partition('::')[2]}"
    checked = item.get_closest_marker("types") is not None or crc32(name.encode()) % TYPES_EVERY == 0
    type_checks.update("jaxtyping_disable", not checked)


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder of tiny models of every kind, and a text."""
    from commands import hub_folder

    return hub_folder(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
