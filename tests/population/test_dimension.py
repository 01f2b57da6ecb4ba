"""Effective dimension and rank of the population: explicit refits, known populations, and what the data leave open."""

import json
import math
from dataclasses import replace

import pytest
import torch
from builders import grams_of

import fisherfunc as ff
from benchmarks.coverage import population
from benchmarks.coverage import sample as simulated
from fisherfunc.population import EffectiveDimension, Estimate, PopulationSummary
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.dimension import curve_of
from fisherfunc.population.estimate import spread
from fisherfunc.population.leading import HeldOut, bracket_of_leading
from fisherfunc.population.moments import moments_of
from fisherfunc.population.paired import dimension_at
from fisherfunc.population.rank import _bounds
from fisherfunc.testing import clustered_grams


def sample(sizes, num_params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    scale = torch.arange(1.0, num_params + 1, dtype=torch.float64).rsqrt()
    shared = torch.randn(len(sizes), num_params, generator=generator, dtype=torch.float64)
    own = torch.randn(len(sequence), num_params, generator=generator, dtype=torch.float64)
    return (shared[sequence] + own) * scale, sequence


def refitted(rows, sequence, ridge):
    """κ and d(κ) as they are defined, from the P × P matrices of all sequences but one."""
    eye, outside, dimensions = torch.eye(rows.shape[1], dtype=torch.float64), 0.0, []
    for s in sequence.unique():
        rest, left = rows[sequence != s], rows[sequence == s]
        inverse = torch.linalg.inv(rest.mT @ rest + ridge * eye)
        outside += (left @ inverse @ left.mT).trace().item()
        dimensions.append((rest.mT @ rest @ inverse).trace().item())
    dimension = sum(dimensions) / len(dimensions)
    return ridge / len(rows) * outside / dimension, dimension


@pytest.mark.parametrize(("sizes", "num_params"), [([3, 1, 4, 2, 2], 30), ([3, 1, 4, 2, 2], 5), ([1] * 6, 9)])
def test_the_curve_is_that_of_explicit_refits(sizes, num_params):
    rows, sequence = sample(sizes, num_params)
    grams = grams_of({"w": rows}, sequence=sequence)
    gram = grams.block()
    curve = curve_of(gram, torch.linalg.eigh(gram), clusters_of(grams, None, "it"), floor=1e-12, largest=0.0)
    logs = curve.kappa.log()
    for ridge in (1e-2, 1.0, 30.0):  # between points of the curve, on a chord of its logarithm
        kappa, dimension = refitted(rows, sequence, ridge)
        if kappa < float(curve.kappa[0]):
            continue
        right = int(torch.searchsorted(curve.kappa, kappa).clamp(1, len(logs) - 1))
        ends = curve.dimension[right - 1], curve.dimension[right]
        assert float(ends[1]) <= dimension * (1 + 1e-9) and dimension <= float(ends[0]) * (1 + 1e-9)
        (found,) = ff.population.effective_dimension(grams, [kappa]).estimates
        assert found.estimate == pytest.approx(dimension, rel=2e-2)  # three points a decade, and a cubic between them


def test_the_band_is_that_of_refits_without_each_sequence():
    """At the ends of the curve, which are anchors: κ and d without s, moved along the curve to this κ."""
    rows, sequence = sample([3, 2, 4, 2, 2, 3], 40)
    grams = grams_of({"w": rows}, sequence=sequence)
    gram = grams.block()
    curve = curve_of(gram, torch.linalg.eigh(gram), clusters_of(grams, None, "it"), floor=1e-12, largest=0.0)
    ridge = 10 * float(torch.linalg.eigvalsh(gram)[-1])  # the first of the curve
    kappa, _ = refitted(rows, sequence, ridge)
    assert float(curve.kappa[-1]) == pytest.approx(kappa, rel=1e-9)
    slope = float((curve.dimension[-1] / curve.dimension[-2]).log() / (curve.kappa[-1] / curve.kappa[-2]).log())
    moved = []
    for s in range(6):
        rest, of = rows[sequence != s], sequence[sequence != s]
        kappa_s, _ = refitted(rest, of, ridge)
        own = (rest.mT @ rest @ torch.linalg.inv(rest.mT @ rest + ridge * torch.eye(40, dtype=torch.float64))).trace()
        # the mean over t of d without s and t belongs to κ; what its jackknife takes is d without s
        without_two = refitted(rest, of, ridge)[1]
        moved.append(own.log().item() - slope * math.log(kappa_s * without_two / own.item() / kappa))
    moved = torch.tensor(moved, dtype=torch.float64)
    torch.testing.assert_close(curve.deviations[-1], moved - moved.mean(), rtol=1e-6, atol=1e-9)


def test_the_error_of_the_curve_is_what_it_spreads_by_between_samples():
    """Also between anchors, λ = 1/k² at 0.1 λ₁: the spread of 30 samples is known to 13 %."""
    of, generator = population("1/k^2", "gaussian"), torch.Generator().manual_seed(0)
    logs, errors = [], []
    for _ in range(30):
        grams = simulated(of, num_sequences=20, num_tokens=16, generator=generator)
        values = torch.tensor(dimension_at(ff.population.summary(grams, num_leading=1).left_out, 0.1)).log()
        logs.append(values[0])
        errors.append(spread(values[1:])[0])
    assert 0.7 < sum(errors) / 30 / float(torch.stack(logs).std()) < 1.4


def test_the_dimension_is_that_of_the_population_where_the_samples_is_not():
    """λ = 1/k: within 5 % at every κ that 20 sequences resolve; the sample's own is further off in the middle."""
    values = [1 / k for k in range(1, 301)]
    grams = clustered_grams(values, num_sequences=20, num_tokens=8, correlation=0.3, seed=0)
    found = ff.population.effective_dimension(grams)
    truth = [sum(x / (x + kappa) for x in values) for kappa in found.kappas]
    for kappa, want, estimate in zip(found.kappas, truth, found.estimates, strict=True):
        if kappa < 1:  # above, few eigenvalues count, and a sample of 20 sequences has an error of its own
            assert estimate.estimate == pytest.approx(want, rel=0.05)
    held = sum(e.low <= want <= e.high for want, e in zip(truth, found.estimates, strict=True))
    assert held > len(truth) / 2
    assert list(found.kappas) == sorted(found.kappas) and found.kappas[0] == found.kappa_min


def test_below_what_is_resolved_there_is_a_bracket_and_no_point():
    values = [1 / k for k in range(1, 301)]
    grams = clustered_grams(values, num_sequences=8, num_tokens=8, correlation=0.3, seed=0)
    smallest = ff.population.effective_dimension(grams).kappa_min
    (below,) = ff.population.effective_dimension(grams, [smallest / 10]).estimates
    truth = sum(x / (x + smallest / 10) for x in values)
    assert below.estimate is None and "below" in below.warning
    assert below.low <= truth <= below.high <= 300


def test_dependence_of_norms_and_directions_warns():
    """Norms² 50 : 1 in orthogonal halves: the curve is far too high, and says so; with norms 1 : 1 it is silent."""
    generator = torch.Generator().manual_seed(0)

    def estimates(ratio):
        half = torch.rand(160, 1, generator=generator, dtype=torch.float64) < 0.5
        rows = torch.randn(160, 200, generator=generator, dtype=torch.float64)
        left = torch.where(half, rows[:, :100] * ratio**0.5, 0.0)
        right = torch.where(half, 0.0, rows[:, 100:])
        grams = grams_of({"w": torch.cat([left, right], dim=1)}, sequence=torch.arange(160) % 20)
        found = ff.population.effective_dimension(grams)
        truth = [50 * ratio / (ratio / 2 + k) + 50 / (1 / 2 + k) for k in found.kappas]
        return [(e, e.estimate / want) for e, want in zip(found.estimates, truth, strict=True)]

    assert all(e.warning is None for e, _ in estimates(1))
    assert all(e.warning for e, off in estimates(50) if off > 1.2)
    assert max(off for _, off in estimates(50)) > 1.2


def test_bounds_of_the_effective_rank_hold_and_say_where_they_are_wide():
    few = [3.0, 2.0, 1.0, 0.5]
    grams = clustered_grams(few, num_sequences=40, num_tokens=4, correlation=0.3, seed=0)
    entropy = -sum(x / 6.5 * math.log(x / 6.5) for x in few)
    found = ff.population.effective_rank(grams)
    assert found.low <= math.exp(entropy) <= found.high <= 4
    assert found.warning is None and found.estimate is None
    many = [1 / k for k in range(1, 2001)]
    grams = clustered_grams(many, num_sequences=12, num_tokens=4, correlation=0.3, seed=0)
    total = sum(many)
    entropy = -sum(x / total * math.log(x / total) for x in many)
    found = ff.population.effective_rank(grams)
    assert found.low <= math.exp(entropy) <= found.high <= 2000
    assert found.estimate is None and "factor" in found.warning


@pytest.mark.parametrize("seed", range(4))
def test_bounds_are_the_extremes_over_all_spectra_on_a_grid(seed):
    """Four places and shares in steps of 1/60: what agrees with the data is within the bounds, and reaches them."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(61, dtype=torch.float64) / 60
    shares = torch.cartesian_prod(steps, steps, steps)
    shares = torch.cat([shares, 1 - shares.sum(dim=1, keepdim=True)], dim=1)
    shares = shares[shares[:, 3] > -1e-9]
    grid = torch.tensor([0.004, 0.02, 0.1, 0.5], dtype=torch.float64)
    of = torch.rand(4, generator=generator, dtype=torch.float64)
    of = of / of.sum()
    kappa = 0.05
    dimension, purity, count = (of / (grid + kappa)).sum(), (of * grid).sum(), (of / grid).sum()
    found = {"dimension": (shares / (grid + kappa)).sum(dim=1) / dimension, "purity": (shares @ grid) / purity}
    agree = torch.stack([(x - 1).abs() < 0.15 for x in found.values()]).all(dim=0)
    agree &= (shares / grid).sum(dim=1) < 1.1 * count
    ranks = (shares[agree] @ -grid.log()).exp()
    ends = {"low": 0.85 * float(purity), "high": 1.15 * float(purity)}
    power = 1, Estimate(estimate=None, level=0.95, num_clusters=3, method="", **ends)
    data = [(kappa, 0.85 * float(dimension), 1.15 * float(dimension))]
    low, high = _bounds(grid, data, [power], num_params=1.1 * float(count))
    assert low * (1 - 1e-6) <= float(ranks.min()) <= low * 1.1
    assert high * 0.9 <= float(ranks.max()) <= high * (1 + 1e-6)


def test_zero_and_rank_one_and_orthogonal_grams_have_summaries():
    for rows in (
        torch.zeros(5, 3, dtype=torch.float64),
        torch.ones(5, 1, dtype=torch.float64) * torch.tensor([[1.0, 2.0]], dtype=torch.float64),
        torch.eye(5, dtype=torch.float64),
        torch.eye(6, dtype=torch.float64)[[0, 0, 1]],
        torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
    ):
        found = ff.population.summary(grams_of({"w": rows}), num_leading=2)
        estimates = [found.block_diagonal_error, found.leading_eigenvalue, found.effective_rank]
        estimates += [*found.moments, *found.effective_dimension.estimates, *found.leading_sums.sums]
        estimates += [found.participation_ratio.full, found.squared_norm.full, found.trace.full]
        assert all(math.isfinite(e.low) and math.isfinite(e.high) and e.low <= e.high for e in estimates)
        assert all(e.estimate is None or e.low <= e.estimate <= e.high for e in estimates)


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_gradients_times_c_have_eigenvalues_times_c_squared(scale):
    rows, sequence = sample([3, 2, 4, 2, 2, 3], 40)
    before, after = (ff.population.summary(grams_of({"w": rows * c}, sequence=sequence)) for c in (1.0, scale))

    def numbers(found, square):
        one = [found.participation_ratio.full, found.block_diagonal_error, found.effective_rank]
        one += found.effective_dimension.estimates
        pairs = [(e, 1.0) for e in one] + [(e, square) for e in (found.trace.full, found.leading_eigenvalue)]
        pairs += [(found.squared_norm.full, square**2), (found.moments[2], square**3), (found.moments[3], square**4)]
        return [end / unit for e, unit in pairs for end in (e.low, e.high)] + [
            found.effective_dimension.kappa_min / square
        ]

    # linear programmes are solved to 1e-7, and what the grid starts from is compared on a scale of the trace
    assert numbers(after, scale**2) == pytest.approx(numbers(before, 1.0), rel=1e-4, abs=1e-12)


def test_a_summary_is_what_each_estimator_gives_and_survives_json():
    generator = torch.Generator().manual_seed(0)
    tree = {n: torch.randn(20, 6, generator=generator, dtype=torch.float64) for n in ("h.0.w", "h.1.w")}
    grams = grams_of(tree, sequence=torch.arange(20) % 7)
    documents = [0, 1, 2, 3, 4, 5, 5]
    found = ff.population.summary(grams, clusters=documents, level=0.9, num_leading=2)
    options = {"clusters": documents, "level": 0.9}
    assert found.num_clusters == 6 and len(found.leading_sums.sums) == 2
    for name in ("squared_norm", "participation_ratio"):
        both = getattr(found, name), getattr(ff.population, name)(grams, **options)
        assert dict(both[0]) == dict(both[1])
        of_full = [(e.full.estimate, e.full.low, e.full.high) for e in both]  # summed in another order
        assert of_full[0] == pytest.approx(of_full[1], rel=1e-12)
    assert found.coupling == ff.population.block_coupling(grams, **options)
    assert found.block_diagonal_error == ff.population.block_diagonal_error(grams, **options)
    assert found.moments == ff.population.moments(grams, **options)
    assert found.effective_dimension == ff.population.effective_dimension(grams, **options)
    assert found.effective_rank == ff.population.effective_rank(grams, **options)
    alone = ff.population.leading_eigenvalue(grams, **options)
    assert (found.leading_eigenvalue.low, found.leading_eigenvalue.high) == pytest.approx((alone.low, alone.high))
    content = json.loads(json.dumps(found.to_dict()))
    assert PopulationSummary.from_dict(content).to_dict() == found.to_dict()
    curve = json.loads(json.dumps(found.effective_dimension.to_dict()))
    assert EffectiveDimension.from_dict(curve) == found.effective_dimension


def test_dampings_that_are_none_are_refused():
    grams = grams_of({"w": torch.eye(4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="positive dampings, got 0"):
        ff.population.effective_dimension(grams, [1.0, 0.0])


def test_where_all_eigenvalues_are_round_off_the_dimension_says_so():
    rows, sequence = sample([50] * 6, 20)
    grams = grams_of({"w": rows}, sequence=sequence)
    largest = float(torch.linalg.eigvalsh(grams.block())[-1])
    coarse = replace(grams, precision=torch.bfloat16)  # 300 rows at 2^-7 each: more than the whole
    for unresolved in (coarse, replace(grams, errors={"w": torch.tensor(0.9 * largest)})):
        found = ff.population.summary(unresolved)
        assert all("round-off" in entry.warning for entry in found.effective_dimension.estimates)
        assert found.effective_dimension.resolution >= 0.9 * largest / 300
    measured = ff.population.summary(replace(coarse, errors={"w": torch.tensor(1e-6 * largest)})).effective_dimension
    assert not any("round-off" in (entry.warning or "") for entry in measured.estimates)
    assert measured.resolution == pytest.approx(1e-6 * largest / 300)


def test_directions_that_turn_with_each_cluster_are_no_lower_end():
    """What they hold of the clusters is then no sample of independent numbers; of λ₁ moments give the end in place."""
    grams = clustered_grams([4.0, 1.0, 1.0], num_sequences=9, num_tokens=4, correlation=0.2, seed=0)
    found = clusters_of(grams, None, "a test")
    moments = moments_of(grams.block(), found)

    def bracket(inside):
        outside = torch.full((9, 1), 3.9 * 4, dtype=torch.float64) + torch.arange(9)[:, None] / 100
        values = torch.tensor([inside], dtype=torch.float64)
        return bracket_of_leading(moments, HeldOut(
            inside=values, without=values.expand(9, 1), outside=outside, sizes=found.sizes
        ), 0.95)  # fmt: skip

    stable, turning = bracket(3.9 / 0.51), bracket(3.9 / 0.49)
    assert stable.method.startswith("out of sample") and stable.low == pytest.approx(3.9, rel=0.02)
    assert turning.method.startswith("p") and turning.low < stable.low


def test_of_three_clusters_the_lower_end_is_that_of_the_second_moment_over_the_trace():
    """‖F‖²/tr F ≤ λ₁ needs pairs of clusters alone."""
    grams = clustered_grams([1.0] * 30, num_sequences=3, num_tokens=4, correlation=0.2, seed=0)
    found = ff.population.leading_eigenvalue(grams)
    assert found.method.startswith("p2/p1")
    ratio = ff.population.squared_norm(grams).full.estimate / ff.population.moments(grams, num=1)[0].estimate
    assert found.low < ratio
