"""Norms and noise of gradients, density, damping and tail of a spectrum: closed forms and the rows themselves."""

import json
import math
from dataclasses import replace

import pytest
import torch
from builders import grams_of, matrices, total_square
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.statistics import (
    effective_dimension_curve,
    gradient_noise_scale,
    gradient_norms,
    mean_gradient_norm,
    spectral_density,
    tail_exponent,
)
from fisherfunc.statistics import tail as module
from fisherfunc.testing import gradient_trees


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum_of(eigenvalues, *, resolution=0.0):
    values = torch.as_tensor(eigenvalues, dtype=torch.float64).sort(descending=True).values
    return Spectrum(
        eigenvalues=values,
        resolution=torch.tensor(resolution).double(),
        negative_part=torch.zeros(()).double(),
        num_units=len(values),
        num_params=None,
        solver="given",
    )


@given(gradient_trees())
def test_norms_are_those_of_the_rows_and_of_their_mean(tree):
    rows = torch.cat(list(matrices(tree).values()), dim=1)
    grams, scale = grams_of(tree), total_square(tree) ** 0.5
    assert_close(gradient_norms(grams), torch.linalg.vector_norm(rows, dim=1), atol=1e-7 * scale, rtol=1e-7)
    want = torch.linalg.vector_norm(rows.mean(dim=0))
    assert_close(mean_gradient_norm(grams), want, atol=1e-7 * scale, rtol=1e-7)
    name = next(iter(tree))
    own = torch.linalg.vector_norm(matrices(tree)[name], dim=1)
    assert_close(gradient_norms(grams, [name]), own, atol=1e-7 * scale, rtol=1e-7)


@given(gradient_trees(max_rows=6), st.data())
def test_the_noise_scale_is_its_definition(tree, data):
    rows = torch.cat(list(matrices(tree).values()), dim=1)
    sequence = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))))
    if len(sequence.unique()) < 2:
        return
    found = gradient_noise_scale(grams_of(tree, sequence=sequence))
    pairs = [(n, m) for n in range(len(rows)) for m in range(len(rows)) if sequence[n] != sequence[m]]
    squared = sum(float(rows[n] @ rows[m]) for n, m in pairs) / len(pairs)
    scale = total_square(tree)
    assert found.squared_mean == pytest.approx(squared, abs=1e-11 * scale)
    moment = float(rows.square().sum()) / len(rows)
    assert found.trace_covariance == pytest.approx(moment - squared, abs=1e-11 * scale)
    plain = rows.mean(dim=0).square().sum().item()
    assert found.plug_in_squared_mean == pytest.approx(plain, abs=1e-11 * scale)
    assert found.num_sequences == len(sequence.unique())
    if squared > 1e-6 * scale:
        assert found.noise_scale == pytest.approx((moment - squared) / squared, rel=1e-4)
    if plain > 1e-6 * scale:
        assert found.plug_in_noise_scale == pytest.approx((moment - plain) / plain, rel=1e-4)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_with_a_token_a_sequence_the_covariance_is_the_usual_unbiased_one():
    rows = gaussian(9, 4) + 1
    found = gradient_noise_scale(grams_of({"w": rows}))
    assert found.trace_covariance == pytest.approx(rows.var(dim=0).sum().item(), rel=1e-12)


def test_over_many_samples_the_estimates_are_unbiased_and_the_plug_in_is_not():
    mean, trials = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64), 600
    sequence = torch.arange(12) // 3
    shared = gaussian(trials, 4, 1, 3)
    rows = (shared.expand(-1, -1, 3, -1).reshape(trials, 12, 3) + gaussian(trials, 12, 3, seed=1)) / 2**0.5 + mean
    found = [gradient_noise_scale(grams_of({"w": g}, sequence=sequence)) for g in rows]
    average = {n: sum(getattr(f, n) for f in found) / trials for n in ("squared_mean", "trace_covariance")}
    assert average["squared_mean"] == pytest.approx(0.3, abs=0.06)  # its standard error is 0.02
    assert average["trace_covariance"] == pytest.approx(3.0, abs=0.15)
    plug_in = sum(f.plug_in_squared_mean for f in found) / trials
    assert plug_in == pytest.approx(0.3 + 3 * (1 / 2 / 4 + 1 / 2 / 12), abs=0.06)  # shared and own parts of the noise


def test_a_mean_that_is_not_told_from_zero_has_no_noise_scale():
    found = gradient_noise_scale(grams_of({"w": torch.tensor([[1.0], [-1.0]])}))
    assert found.noise_scale is None and found.plug_in_noise_scale is None and found.squared_mean == -1
    with pytest.raises(ValueError, match="centred rows is zero"):
        gradient_noise_scale(grams_of({"w": gaussian(3, 2)}).center())
    with pytest.raises(ValueError, match="at least 2 sequences, got 1"):
        gradient_noise_scale(grams_of({"w": gaussian(1, 1)}))


eigenvalues = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


@given(eigenvalues, st.integers(1, 12))
def test_the_area_of_the_density_is_the_number_of_resolved_eigenvalues(values, num_bins):
    found = spectral_density(spectrum_of([*values, 0.0, 1e-8], resolution=1e-7), num_bins=num_bins)
    assert found.area == pytest.approx(len(values), rel=1e-9) and found.num_below == 2
    assert len(found.density) == num_bins == len(found.edges) - 1
    assert found.edges[0].item() <= min(values) * (1 + 1e-9) and found.edges[-1].item() >= max(values) * (1 - 1e-9)


def test_the_density_counts_each_bin():
    found = spectral_density(spectrum_of([1.0, 2.0, 5.0, 20.0, 50.0, 1000.0]), num_bins=3)
    assert_close(found.edges, torch.tensor([1.0, 10.0, 100.0, 1000.0]).double())
    assert found.density.tolist() == pytest.approx([3.0, 2.0, 1.0])


@given(eigenvalues)
def test_the_curve_is_the_effective_dimension_at_each_damping(values):
    spectrum = spectrum_of(values)
    curve = effective_dimension_curve(spectrum, num_points=5)
    want = [ff.metrics.effective_dimension(spectrum, gamma).item() for gamma in curve.gamma.tolist()]
    assert curve.dimension.tolist() == pytest.approx(want, rel=1e-12)
    ends = [curve.gamma[0].item(), curve.gamma[-1].item()]
    assert ends == pytest.approx([min(values), max(values)], rel=1e-9)
    given_ = effective_dimension_curve(spectrum, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert given_.dimension[1].item() == pytest.approx(ff.metrics.effective_dimension(spectrum, 2.0).item())


def test_curves_of_nothing_are_errors():
    zero = spectrum_of([0.0, 0.0])
    for curve in (spectral_density, effective_dimension_curve, tail_exponent):
        with pytest.raises(ValueError, match="no eigenvalue of 2 is above the resolution"):
            curve(zero)
    with pytest.raises(ValueError, match=r"positive dampings, got 0\.0"):
        effective_dimension_curve(zero, torch.zeros(1))
    with pytest.raises(ValueError, match="num_bins=0"):
        spectral_density(spectrum_of([1.0]), num_bins=0)


def pareto(count, exponent, *, begin=1.0, seed=0):
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return begin * uniform ** (-1 / (exponent - 1))


def loop_fit(values, least):
    """The method of the paper, written out."""
    values, best = sorted(values), None
    for begin in sorted(set(values)):
        tail = [v for v in values if v >= begin]
        if len(tail) < least or tail[-1] == begin:
            continue
        alpha = 1 + len(tail) / sum(math.log(v / begin) for v in tail)
        law = [1 - (v / begin) ** (1 - alpha) for v in tail]
        distance = max(max((i + 1) / len(tail) - c, c - i / len(tail)) for i, c in enumerate(law))
        if best is None or distance < best[0]:
            best = (distance, alpha, begin, len(tail))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_that_of_the_paper(seed):
    values = torch.cat([pareto(40, 2.5, seed=seed), gaussian(20, seed=seed).abs() + 0.1])
    found = tail_exponent(spectrum_of(values), num_replicates=0)
    distance, alpha, begin, count = loop_fit(values.tolist(), 10)
    assert (found.distance, found.exponent, found.begin) == pytest.approx((distance, alpha, begin), rel=1e-9)
    assert (found.num_tail, found.num_eigenvalues, found.p_value) == (count, 60, None)
    assert found.standard_error == pytest.approx((alpha - 1) / math.sqrt(count), rel=1e-9)


@pytest.mark.parametrize("exponent", [1.8, 2.5, 3.5])
def test_the_exponent_of_a_power_law_is_found_and_the_law_not_rejected(exponent):
    found = tail_exponent(spectrum_of(pareto(600, exponent)), num_replicates=40)
    assert found.exponent == pytest.approx(exponent, abs=4 * found.standard_error)
    assert found.p_value > 0.1 and found.num_tail > 100


def test_what_is_no_power_law_is_rejected():
    values = torch.linspace(1, 2, 500, dtype=torch.float64)
    found = tail_exponent(spectrum_of(values), least=250, num_replicates=40)
    assert found.p_value < 0.1


def test_eigenvalues_that_fall_with_rank_have_the_exponent_that_the_docstring_states():
    rank = torch.arange(1, 801, dtype=torch.float64)
    assert tail_exponent(spectrum_of(rank**-2.0), num_replicates=0).exponent == pytest.approx(1.5, abs=0.1)


def test_the_samples_of_the_p_value_are_the_law_above_and_draws_of_the_body_below():
    body, tail = torch.linspace(0.1, 0.9, 1000, dtype=torch.float64), pareto(3000, 2.5)
    values = torch.cat([body, tail]).sort().values
    sample = module._sample(values, 1.0, 2.5, torch.Generator().manual_seed(0))
    below, above = sample[sample < 1], sample[sample >= 1]
    assert len(sample) == 4000 and len(above) == pytest.approx(3000, abs=150) and torch.isin(below, body).all()
    assert above.log().mean().item() == pytest.approx(1 / 1.5, rel=0.08)  # ln x is exponential with rate α − 1


def test_the_p_value_is_seeded_and_scale_free():
    values = pareto(60, 2.0)
    once, again = (tail_exponent(spectrum_of(values), num_replicates=30, seed=1) for _ in range(2))
    assert once == again
    scaled = tail_exponent(spectrum_of(1024 * values), num_replicates=30, seed=1)
    assert scaled.exponent == pytest.approx(once.exponent, rel=1e-9) and scaled.begin == pytest.approx(
        1024 * once.begin
    )
    assert json.loads(json.dumps(once.to_dict(), allow_nan=False)) == once.to_dict()


def test_the_exponent_of_a_sample_is_not_that_of_its_population_and_says_so():
    """λ_k = k^-1/2 has α = 3; a Wishart matrix of fewer rows than parameters is nearly flat at its head."""
    rows = gaussian(100, 1000) * torch.arange(1, 1001, dtype=torch.float64) ** -0.25
    found = tail_exponent(ff.spectrum_of_gradients({"w": rows}).full, num_replicates=20)
    assert found.exponent > 3 + 2 * found.standard_error and found.p_value > 0.1
    assert "too large" in found.warning
    narrow = ff.spectrum_of_gradients({"w": rows[:, :40]}).full  # all of the population's eigenvalues are there
    assert tail_exponent(narrow, num_replicates=0).warning is None


def test_too_few_eigenvalues_have_no_exponent():
    with pytest.raises(ValueError, match="at least 10 resolved eigenvalues, got 9"):
        tail_exponent(replace(spectrum_of(pareto(12, 2.0)), resolution=pareto(12, 2.0).sort().values[2]))
    with pytest.raises(ValueError, match="least=2"):
        tail_exponent(spectrum_of(pareto(12, 2.0)), least=2)
    with pytest.raises(ValueError, match="that differ, got 12"):
        tail_exponent(spectrum_of([3.0] * 12))
