"""Tests on a GPU: `FISHERFUNC_TEST_DEVICE=cuda python -m pytest tests`.

What the tests make, models included, then lies on that device; what the package makes lies where the package says, and
what models make while it runs them, on the CPU, as for any user.
"""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("FISHERFUNC_TEST_DEVICE", "cpu")
TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "fisherfunc"
ON_CPU = frozenset(
    str(TESTS / name)
    for name in [
        "gradients/test_checkpoint_folder.py",
        "laws/test_targets_rows.py",
        "runtime/test_threads.py",
        "linalg/grams/test_token_grams.py",
        "models/test_huggingface.py",
        "surface/test_cli.py",
        "surface/test_cli_failures.py",
        "surface/test_cli_resume.py",
        "surface/test_cli_tokens.py",
        "surface/commands/test_compare_command.py",
        "surface/test_files.py",
        "surface/test_recorder.py",
        "surface/test_results_of_statistics.py",
        "surface/test_targets_wording.py",
    ]
)
"""Of files, which hold what was on a CPU; of what a CPU alone has; of the command line, in processes of its own."""


class OnDevice(TorchFunctionMode):
    """Tensors that tests, or what they call, make without saying where."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None or not _for_tests():
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **{**kwargs, "device": DEVICE})


def _for_tests() -> bool:
    """Whether, of the package and the tests, the tests are nearer in the stack, and not those that stay on the CPU."""
    frame, mine = sys._getframe(2), False
    while frame is not None:
        found = _is_of_tests(frame.f_code.co_filename)
        if found is False or frame.f_code.co_filename in ON_CPU:
            return mine and found is False
        mine = mine or found is True
        frame = frame.f_back
    return mine


@cache
def _is_of_tests(file: str) -> bool | None:
    """None for what is of neither; the package's strategies are part of the tests."""
    path = Path(file)
    if path.is_relative_to(TESTS) or path.is_relative_to(PACKAGE / "testing"):
        return True
    return False if path.is_relative_to(PACKAGE) else None
