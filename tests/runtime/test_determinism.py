"""`deterministic` puts every global back, whatever happens inside; results do not depend on globals."""

import os
import random

import pytest
import torch
from zoo import build

import fisherfunc as ff

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def globals_now():
    return (
        random.getstate(),
        torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


@pytest.fixture(params=["default", "everything set"])
def start(request, monkeypatch):
    if request.param == "default":
        yield
        return
    monkeypatch.setenv(WORKSPACE, ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("failing", [False, True])
def test_every_global_is_put_back(start, failing):
    before = globals_now()
    try:
        with ff.deterministic(3):
            inside = globals_now()
            torch.rand(5), random.random()
            if failing:
                raise KeyError("inside")
    except KeyError:
        assert failing
    assert globals_now() == before
    assert inside[2:] == (True, False, True, False, ":4096:8") and inside[:2] != before[:2]


def test_the_seed_sets_both_generators():
    draws = []
    for seed in (1, 1, 2):
        with ff.deterministic(seed):
            draws.append((random.random(), float(torch.rand(()))))
    assert draws[0] == draws[1] and draws[0][0] != draws[2][0] and draws[0][1] != draws[2][1]


def test_contexts_nest():
    with ff.deterministic(1):
        expected = torch.rand(2)
    with ff.deterministic(1):
        first = torch.rand(1)
        with ff.deterministic(9):
            torch.rand(7)
        assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_a_spectrum_is_bitwise_the_same_inside():
    model, batch = build("gpt2")
    outside = ff.fisher_spectrum(model, batch).full.eigenvalues
    torch.manual_seed(99)
    with ff.deterministic(5):
        assert torch.equal(ff.fisher_spectrum(model, batch).full.eigenvalues, outside)
