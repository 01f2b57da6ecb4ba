"""What Lanczos certifies, and what quadrature bounds, in generated cases of a known spectrum; going on after a stop."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfunc as ff
from benchmarks import certificates as cases
from benchmarks.certificates import failures
from fisherfunc.operators import gram_operator


def diagonal(*values):
    return gram_operator(torch.diag(torch.tensor(values, dtype=torch.float64)), num_tokens=1)


def power_law(count, exponent=-0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.arange(1, count + 1, dtype=torch.float64) ** exponent
    q = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))[0]
    return values, gram_operator((q * values) @ q.mT, num_tokens=1)


@settings(max_examples=300)
@given(st.integers(0, 10**6))
def test_certificates_hold(seed):
    assert failures(seed) == []


def test_a_certificate_that_is_too_small_is_seen(monkeypatch):

    solve = ff.kernels.lanczos
    monkeypatch.setattr(
        cases, "lanczos", lambda **o: lambda op: replace(found := solve(**o)(op), bounds=found.bounds / 1e3)
    )
    assert any(failures(seed) for seed in range(60))


def test_twenty_of_a_slow_power_law_take_some_sixty_steps():
    values, operator = power_law(1500)
    found = ff.kernels.lanczos(num_leading=20)(operator)
    assert found.fallback is None and found.num_products <= 80
    assert bool((found.residuals <= 1e-2 * found.eigenvalues).all())
    assert bool(((found.eigenvalues - values[:20]).abs() <= found.bounds).all())


def test_multiplicities_are_found_once_a_space_is_exhausted():
    operator = diagonal(5, 5, 5, 2, 2, 1)
    found = ff.kernels.lanczos(num_leading=6, tolerance=1e-10)(operator)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([5, 5, 5, 2, 2, 1.0]).double(), rtol=1e-12, atol=0)
    assert found.complete and found.num_steps == 6
    fewer = ff.kernels.lanczos(num_leading=4, tolerance=1e-10)(operator)
    assert fewer.eigenvalues[2] > 4 or not fewer.complete  # a space of five steps has a 5 less, and does not hide it


def test_several_vectors_together_find_what_occurs_several_times_before_the_space_is_exhausted():
    """From one vector a space holds one direction of each eigenspace, whatever its size."""
    values = (torch.arange(1, 61, dtype=torch.float64) ** -1.0).repeat_interleave(3).tolist()
    found = ff.kernels.lanczos(num_leading=6, width=3)(diagonal(*values))
    assert found.num_steps < 180 and found.fallback is None
    assert bool(((found.eigenvalues - torch.tensor(values[:6]).double()).abs() <= found.bounds).all())
    alone = ff.kernels.lanczos(num_leading=6, tolerance=0.1)(diagonal(*values))  # before rounding has brought it in
    assert float(alone.eigenvalues[1]) < 0.6


def counted(operator, reads):
    """An operator that notes how many vectors each of its products had."""

    def product(vectors):
        reads.append(vectors.shape[1])
        return torch.stack([operator.token_product(u) for u in vectors.mT], dim=1)

    return replace(operator, block_product=product)


def test_wider_products_are_fewer_for_the_same_residuals():
    values, operator = power_law(600)
    reads = {width: [] for width in (1, 8)}
    for width, taken in reads.items():
        found = ff.kernels.lanczos(num_leading=20, width=width)(counted(operator, taken))
        assert found.fallback is None and bool((found.residuals <= 1e-2 * found.eigenvalues).all())
        assert bool(((found.eigenvalues - values[:20]).abs() <= found.bounds).all())
        assert set(taken) == {width} and sum(taken) == found.num_steps
    assert len(reads[8]) <= len(reads[1]) / 3


def test_probes_that_go_on_together_give_what_they_give_one_by_one():
    _, operator = power_law(80)
    reads = []
    solve = ff.kernels.lanczos_quadrature(num_probes=4, num_steps=9)
    together, alone = solve(counted(operator, reads)), solve(operator)
    assert reads == [4] * 9 and together.num_products == alone.num_products == 4 * 9 + 1
    got, want = together.effective_rank(), alone.effective_rank()
    assert got.value == pytest.approx(want.value, rel=1e-12)
    assert got.quadrature_error == pytest.approx(want.quadrature_error, rel=1e-6)


def test_what_was_missed_is_bounded_where_the_norm_is_known_and_said_to_be_open_where_not():
    known = diagonal(10, 9, 1e-3, 1e-3, 1e-3)
    found = ff.kernels.lanczos(num_leading=2, tolerance=1e-9)(known)
    assert found.complete and 1e-3 <= float(found.missed) < 9
    unknown = ff.kernels.lanczos(num_leading=2, tolerance=1e-9)(replace(known, trace=None, squared_norm=None))
    assert unknown.complete is None and math.isnan(float(unknown.missed))


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_it_goes_on_from_its_steps_to_the_same_bits(count, width):
    _, operator = power_law(60)
    kept, more = [], []
    solve = ff.kernels.lanczos(num_leading=5, width=width)
    whole = solve(operator, keep=kept.append)
    resumed = solve(operator, steps=kept[:count], keep=more.append)
    assert torch.equal(resumed.eigenvalues, whole.eigenvalues) and torch.equal(resumed.bounds, whole.bounds)
    assert len(more) == len(kept) - count // width * width


def test_edge_sizes_and_zero():
    zero = ff.kernels.lanczos(num_leading=3)(gram_operator(torch.zeros(4, 4)))
    assert zero.eigenvalues.tolist() == [0, 0, 0] and float(zero.bounds.max()) == 0
    one = ff.kernels.lanczos(num_leading=20)(diagonal(7))
    assert one.eigenvalues.tolist() == [7] and one.complete
    wide = ff.kernels.lanczos(num_leading=2, width=5)(diagonal(3, 2, 1))
    assert wide.num_steps == 3 and wide.eigenvalues.tolist() == pytest.approx([3, 2])
    assert ff.kernels.lanczos_quadrature(num_probes=2)(gram_operator(torch.zeros(4, 4))).effective_rank().value == 0
    for options, message in (
        ({"num_leading": 0}, "num_leading >= 1, got num_leading=0"),
        ({"width": 0}, "width >= 1, got width=0; 1 multiplies one vector at a time"),
        ({"tolerance": 0}, "tolerance > 0, got tolerance=0"),
        ({"num_leading": 5, "num_steps": 4}, "num_steps >= num_leading, got num_steps=4, num_leading=5"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.kernels.lanczos(**options)
    with pytest.raises(ValueError, match="num_steps >= 2, got num_steps=1"):
        ff.kernels.lanczos_quadrature(num_steps=1)
    with pytest.raises(ValueError, match="a finite square matrix, got shape"):
        gram_operator(torch.zeros(2, 3))


def test_a_product_that_is_not_finite_is_an_error():
    operator = replace(diagonal(1, 2), token_product=lambda u: u * math.nan)
    with pytest.raises(ValueError, match="product 1 with gram is not finite"):
        ff.kernels.lanczos(num_leading=1)(operator)


def truths(values):
    share = values / values.sum()
    return {
        "trace": float(values.sum()),
        "effective_rank": float(torch.special.entr(share).sum().exp()),
        "participation_ratio": float(1 / share.square().sum()),
    }


def test_of_a_diagonal_matrix_signs_make_no_error_and_the_rest_is_bounded():
    """uᵀ f(D) u is tr f(D) for every vector of signs: what is left is the error of quadrature."""
    values = torch.arange(1, 41, dtype=torch.float64) ** -0.8
    found = ff.kernels.lanczos_quadrature(num_probes=3, num_steps=6)(diagonal(*values.tolist()))
    for name, value in truths(values).items():
        got = getattr(found, name)()
        assert abs(got.value - value) <= got.quadrature_error * (1 + 1e-9) + 1e-9 * value, name
    for gamma in (0.01, 0.3):
        for got, f in (
            (found.effective_dimension(gamma), values / (values + gamma)),
            (found.log_det(gamma), (values / gamma).log1p()),
        ):
            assert abs(got.value - float(f.sum())) <= got.quadrature_error * (1 + 1e-9)
    for threshold in (0.07, 0.35):
        got = found.num_above(threshold)
        assert abs(got.value - int((values > threshold).sum())) <= got.quadrature_error + 1e-9
    edges = torch.tensor([0.03, 0.1, 0.3, 1.1], dtype=torch.float64)
    for got, low, high in zip(found.density(edges), edges, edges[1:], strict=False):
        assert abs(got.value - int(((values > low) & (values <= high)).sum())) <= got.quadrature_error + 1e-9


def test_more_steps_have_a_smaller_error_of_quadrature_down_to_rounding():
    _, operator = power_law(50)
    errors = [
        ff.kernels.lanczos_quadrature(num_probes=2, num_steps=steps)(operator).effective_rank().quadrature_error
        for steps in (3, 6, 12, 50)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6


def test_intervals_of_probes_hold_the_truth_about_as_often_as_they_say():
    values, operator = power_law(60, -1.0)
    truth, held, runs = truths(values), dict.fromkeys(truths(values), 0), 100
    for seed in range(runs):
        found = ff.kernels.lanczos_quadrature(num_probes=6, num_steps=12, seed=seed)(operator)
        for name, value in truth.items():
            got = getattr(found, name)()
            held[name] += got.low <= value <= got.high
    # 95 of 100, less four standard deviations of a count of them
    assert min(held.values()) >= 95 - 4 * (100 * 0.95 * 0.05) ** 0.5, held


def test_a_known_trace_is_exact():
    _, operator = power_law(30)
    got = ff.kernels.lanczos_quadrature(num_probes=2)(operator).trace()
    assert (got.value, got.quadrature_error, got.standard_error) == (operator.trace, 0, 0)
    unknown = ff.kernels.lanczos_quadrature(num_probes=4)(replace(operator, trace=None)).trace()
    assert unknown.standard_error > 0 and unknown.low <= operator.trace <= unknown.high
