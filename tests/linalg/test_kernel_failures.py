"""Solvers are made to fail: every stage of the fallback is recorded, and no failure becomes a spectrum.

Round-off is told from structure: the numerical rank is found in both precisions, an indefinite Gram is an error.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fisherfunc.linalg import kernels, metrics
from fisherfunc.linalg.gram import gram_of
from fisherfunc.testing import gradient_matrices

ROWS = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRAM = gram_of(ROWS)
TRUTH = torch.linalg.svdvals(ROWS).square() / 4
INDEFINITE = torch.diag(torch.tensor([2.0, 1.0, -1e-3], dtype=torch.float64))
STAGES = (
    "gram_eigh(float32)",
    "gram_eigh(float64)",
    "gram_eigh(float64) after a jitter of 1e-10 tr K/n",
    "gram_svd(float64)",
)


def fail_times(monkeypatch, times, *, solver="eigvalsh", outcome=None):
    """Make the first calls of a solver raise, or return `outcome`."""
    original, calls = getattr(torch.linalg, solver), iter(range(times))

    def failing(matrix):
        call = next(calls, None)
        if call is None:
            return original(matrix)
        if outcome is not None:
            return torch.full_like(matrix.diagonal(), outcome)
        raise torch.linalg.LinAlgError(f"forced failure {call}\nwith a second line")

    monkeypatch.setattr(torch.linalg, solver, failing)


@pytest.mark.parametrize("times", range(4))
def test_each_stage_gives_the_spectrum_and_records_why_those_before_it_failed(monkeypatch, times):
    fail_times(monkeypatch, times)
    spectrum = kernels.robust_eigh(dtype=torch.float32)(GRAM, num_params=7)
    assert spectrum.solver == STAGES[times]
    assert_close(spectrum.eigenvalues.double(), TRUTH, atol=0, rtol=1e-12 if times else 1e-5)
    if times == 0:
        assert spectrum.fallback is None
    else:
        assert spectrum.fallback.split("; ") == [f"_LinAlgError: forced failure {n}" for n in range(times)]


def test_a_solver_that_returns_nan_has_failed_like_one_that_raises(monkeypatch):
    fail_times(monkeypatch, 1, outcome=float("nan"))
    spectrum = kernels.robust_eigh(dtype=torch.float32)(GRAM)
    assert spectrum.solver == "gram_eigh(float64)" and "returned a NaN" in spectrum.fallback
    assert_close(spectrum.eigenvalues, TRUTH, atol=0, rtol=1e-12)


def test_if_all_fail_the_error_gives_every_reason(monkeypatch):
    fail_times(monkeypatch, 3)
    fail_times(monkeypatch, 1, solver="svdvals")
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"all 4 eigensolvers failed on a Gram of shape \(4, 4\)"
    ) as raised:
        kernels.robust_eigh()(GRAM)
    assert all(f"forced failure {n}" in str(raised.value) for n in range(3))
    assert str(raised.value).count("forced failure") == 4


def test_an_error_that_is_no_solver_failure_is_not_swallowed():
    def broken(gram, **context):
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        kernels.fallback(broken, kernels.gram_eigh())(GRAM)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_an_error(bad):
    gram = GRAM.clone()
    gram[1, 2] = gram[2, 1] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="eigensolvers failed"):
        kernels.robust_eigh()(gram)


@pytest.mark.parametrize("times", range(4))
def test_an_indefinite_gram_is_an_error_at_every_stage(monkeypatch, times):
    fail_times(monkeypatch, times)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        kernels.robust_eigh()(INDEFINITE, num_params=2)


@pytest.mark.parametrize("make", [kernels.gram_eigh, kernels.gram_svd])
def test_the_negative_part_is_reported(make):
    spectrum = make()(INDEFINITE)
    assert_close(spectrum.negative_part.item(), -1e-3 / 3, atol=0, rtol=1e-9)
    last = 0.0 if make is kernels.gram_eigh else 1e-3 / 3  # singular values have no sign
    assert_close(spectrum.eigenvalues, torch.tensor([2 / 3, 1 / 3, last]).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("num_params", [None, 2])
def test_a_jitter_hides_no_negative_eigenvalue(num_params):
    tiny = torch.diag(torch.tensor([1.0, 1.0, -1e-11], dtype=torch.float64))
    kernel = kernels.jittered(kernels.gram_eigh())
    assert kernel(INDEFINITE, num_params=num_params).negative_part.item() == pytest.approx(-1e-3 / 3, rel=1e-6)
    assert kernel(tiny).negative_part.item() == pytest.approx(-1e-11 / 3, rel=1e-3)


def test_a_jitter_is_added_in_a_dtype_that_holds_it():
    seen = []

    def spy(gram):
        seen.append(gram.matrix)
        return kernels.gram_eigh()(gram)

    spectrum = kernels.jittered(spy)(GRAM.float())
    assert not torch.equal(seen[0], GRAM.float().double()) and seen[0].dtype == torch.float64
    plain = kernels.gram_eigh()(GRAM.float())
    assert_close(spectrum.eigenvalues, plain.eigenvalues, atol=0, rtol=1e-12)
    assert_close(spectrum.resolution, plain.resolution, atol=0, rtol=1e-6)


@given(gradient_matrices() | gradient_matrices(dtype=torch.float32))
def test_no_gram_of_gradients_is_taken_for_indefinite(rows):
    for kernel in (kernels.robust_eigh(), kernels.checked(kernels.gram_svd())):
        kernels.of_rows(kernel)(rows)
        kernels.of_rows(kernel, dtype=torch.float32)(rows.float())


def test_long_parallel_rows_are_not_taken_for_indefinite():
    """Round-off of sums over P = 10⁶ products: −80 eps λ_max here, beyond n · eps."""
    generator = torch.Generator().manual_seed(0)
    row = 0.5 + torch.rand(1, 1_000_000, generator=generator, dtype=torch.float64)
    rows = torch.tensor([[1.0], [-0.3], [2.7], [0.9], [1.1]], dtype=torch.float64) * row
    spectrum = kernels.of_rows(kernels.robust_eigh())(rows)
    assert metrics.numerical_rank(spectrum).item() == 1


@pytest.mark.parametrize(
    "make",
    [
        kernels.svd,
        kernels.covariance_eigh,
        lambda: kernels.of_rows(kernels.gram_eigh()),
        lambda: kernels.of_rows(kernels.gram_svd()),
        lambda: kernels.of_rows(kernels.gram_eigh(dtype=torch.float32), dtype=torch.float32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_the_numerical_rank_is_the_rank(make, dtype, num_rows, num_columns, data):
    rank = data.draw(st.integers(0, min(num_rows, num_columns)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q[:, :rank]
        for size in (num_rows, num_columns)
    )
    rows = (left * torch.linspace(1, 3, rank, dtype=torch.float64) @ right.mT).to(dtype)
    spectrum = make()(rows)
    assert metrics.numerical_rank(spectrum).item() == rank
    if rank:
        assert metrics.smallest(spectrum).item() == pytest.approx(1 / num_rows, rel=1e-4)
        assert metrics.condition_number(spectrum).item() == pytest.approx(9 if rank > 1 else 1, rel=1e-4)
