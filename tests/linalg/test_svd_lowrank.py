"""The marked approximation: leading eigenvalues from a random sketch, reproducible, the global state untouched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap
from torch.testing import assert_close

from fisherfunc.linalg import kernels

NUM_ROWS, NUM_COLUMNS, RANK = 30, 40, 5


def decaying(rate: float, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """G with the eigenvalues rate^k of F, and these."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(NUM_ROWS, NUM_ROWS, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(NUM_COLUMNS, NUM_ROWS, generator=generator, dtype=torch.float64)).Q
    eigenvalues = rate ** torch.arange(NUM_ROWS, dtype=torch.float64)
    return left * (NUM_ROWS * eigenvalues).sqrt() @ right.mT, eigenvalues


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_it_is_close_where_the_spectrum_decays_and_never_above(seed):
    rows, eigenvalues = decaying(0.5)
    spectrum = kernels.svd_lowrank(rank=RANK, seed=seed)(rows)
    assert spectrum.eigenvalues.shape == (RANK,) and not spectrum.exact
    assert_close(spectrum.eigenvalues, eigenvalues[:RANK], atol=0, rtol=1e-6)
    assert bool((spectrum.eigenvalues <= eigenvalues[:RANK] * (1 + 1e-12)).all())


def test_power_iterations_help_where_the_spectrum_decays_slowly():
    rows, eigenvalues = decaying(0.95)
    errors = [
        (
            eigenvalues[:RANK] - kernels.svd_lowrank(rank=RANK, oversampling=2, power_iterations=k)(rows).eigenvalues
        ).sum()
        for k in (0, 2, 8)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_a_seed_gives_bitwise_the_same_and_another_seed_another_sketch():
    rows, _ = decaying(0.95)
    first, again, other = (kernels.svd_lowrank(rank=RANK, seed=seed)(rows).eigenvalues for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_global_random_state_is_neither_used_nor_changed():
    rows, _ = decaying(0.95)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = kernels.svd_lowrank(rank=RANK)(rows).eigenvalues
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    assert torch.equal(kernels.svd_lowrank(rank=RANK)(rows).eigenvalues, first)


def test_the_global_random_state_is_put_back_after_an_error(monkeypatch):
    def failing(*args, **kwargs):
        torch.rand(3)
        raise torch.linalg.LinAlgError("forced")

    monkeypatch.setattr(torch, "svd_lowrank", failing)
    before = torch.random.get_rng_state()
    with pytest.raises(torch.linalg.LinAlgError):
        kernels.svd_lowrank(rank=RANK)(decaying(0.5)[0])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("oversampling", [0, 10])
def test_a_sketch_of_full_rank_is_exact_whole_and_says_so(oversampling):
    rows, eigenvalues = decaying(0.9)
    spectrum = kernels.svd_lowrank(rank=NUM_ROWS - oversampling, oversampling=oversampling)(rows)
    assert spectrum.exact and spectrum.solver == "svd(float64)"
    assert_close(spectrum.eigenvalues, eigenvalues, atol=1e-13, rtol=0)


def test_the_solver_names_every_option():
    spectrum = kernels.svd_lowrank(rank=2, oversampling=3, power_iterations=1, seed=9)(decaying(0.5)[0])
    assert spectrum.solver == "svd_lowrank(rank=2, oversampling=3, power_iterations=1, seed=9)"


def test_one_sketch_serves_a_stack():
    rows, _ = decaying(0.5)
    kernel = kernels.svd_lowrank(rank=RANK)
    together = vmap(kernel, randomness="same")(torch.stack([rows, 2 * rows]))
    assert_close(together.eigenvalues[0], kernel(rows).eigenvalues, atol=0, rtol=1e-9)
    assert_close(together.eigenvalues[1], 4 * kernel(rows).eigenvalues, atol=0, rtol=1e-9)
    assert not together.exact


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 1, "oversampling": -1}, {"rank": 1, "power_iterations": -1}])
def test_options_out_of_range_are_errors_that_name_them(options):
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=rf"expected {name} >= \d, got {name}={value}"):
        kernels.svd_lowrank(**options)
