"""Paired comparisons: leave-one-out values are those of estimates without a sequence, ratios those of the textbook."""

import json
from dataclasses import replace

import pytest
import torch
from builders import grams_of
from consoles import shown
from scipy.stats import t as student

import fisherfunc as ff
from fisherfunc.partitioning import by_parameter
from fisherfunc.population.paired import LeftOut, paired_dimension, paired_ratio
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.files import read_spectrum, to_json
from fisherfunc.surface.reports.compare_report import compare_report

SEQUENCE = torch.arange(8).repeat_interleave(4)
FACTS = {"batch": "one", "loss": "causal_lm", "fisher": "empirical"}


def gradients(seed, sequence=SEQUENCE):
    """Two models on the same tokens: what `seed` adds is a tenth of what they share."""

    def gaussian(seed, *shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    count = len(sequence)
    shapes = {"a": (count, 9), "b": (count, 5)}
    shared = gaussian(99, int(sequence.max()) + 1, 1)[sequence].exp()
    return {
        n: shared * (gaussian(i, *s) + 0.1 * gaussian(seed * 7 + i + 2, *s)) for i, (n, s) in enumerate(shapes.items())
    }


def grams(seed, sequence=SEQUENCE):
    return replace(grams_of(gradients(seed, sequence), sequence=sequence), provenance=Provenance(**FACTS))


def result_of(of, **options):
    return ff.spectrum_of_grams(of, blocks=by_parameter, population=True, **options)


def test_values_left_out_are_those_of_estimates_without_each_sequence():
    of = grams(1)
    found = ff.population.summary(of, blocks=by_parameter).left_out
    assert found.num_clusters == 8 and set(found.per_block) == {"a", "b"}
    for s, kept in enumerate([torch.ones_like(SEQUENCE, dtype=torch.bool), *(s != SEQUENCE for s in range(8))]):
        rest = of.select(kept)
        ratios = ff.population.participation_ratio(rest, blocks=by_parameter)
        error = ff.population.block_diagonal_error(rest, blocks=by_parameter)
        assert found.full["participation_ratio"][s] == pytest.approx(ratios.full.estimate, rel=1e-10)
        assert found.full["block_diagonal_error"][s] == pytest.approx(error.estimate, rel=1e-8)
        assert found.full["trace"][s] == pytest.approx(float(rest.block().trace()) / rest.num_rows, rel=1e-12)
        for label, num_params in (("a", 9), ("b", 5)):  # estimates end where the range ends
            value = min(found.per_block[label]["participation_ratio"][s], num_params)
            assert value == pytest.approx(ratios[label].estimate, rel=1e-10)


def test_above_fifty_sequences_fifty_folds_are_left_out():
    sequence = torch.arange(60)
    of = grams(1, sequence)
    found = ff.population.summary(of, blocks=by_parameter).left_out
    assert found.num_clusters == 50 and len(found.full["trace"]) == 51
    rest = of.select(sequence >= 2)  # the first fold: those of s · 50 // 60 = 0
    assert found.full["trace"][1] == pytest.approx(float(rest.block().trace()) / 58, rel=1e-12)


def test_a_ratio_has_the_interval_of_the_jackknife_of_its_logarithm():
    """Eight sequences that differ alike: 3.5 degrees of freedom, half of S − 1 as `spread` has it."""
    first, value = (2.0, *[2.0 + 0.1 * (-1) ** s for s in range(8)]), (3.0, *[3.0 - 0.1 * (-1) ** s for s in range(8)])
    found = paired_ratio(value, first, level=0.9)
    logs = torch.tensor([y / x for x, y in zip(first[1:], value[1:], strict=True)]).double().log()
    width = student.ppf(0.95, 3.5) * (7 / 8 * (logs - logs.mean()).square().sum()).sqrt()
    want = 1.5, 1.5 * float((-width).exp()), 1.5 * float(width.exp())
    assert (found.estimate, found.low, found.high) == pytest.approx(want, rel=1e-6)
    assert paired_ratio((1.0, 1.0, -1.0, 1.0), (1.0, 1.0, 1.0, 1.0)) is None


def test_errors_in_common_drop_out_of_ratios_of_results_on_the_same_tokens(tmp_path):
    """Norms vary by a factor of e² between sequences, and are those of both models: the ratio is sure, they are not."""
    results = {name: result_of(grams(seed)) for seed, name in enumerate(("init", "early"))}
    found = ff.compare(results)
    traces = [result.population.trace.full for result in results.values()]
    ratio = found.paired["full"]["trace"]["early"]
    assert found.paired["full"]["trace"]["init"] is None
    assert ratio.estimate == pytest.approx(traces[1].estimate / traces[0].estimate, rel=1e-12)
    assert ratio.low < ratio.estimate < ratio.high < 1 + (traces[0].high / traces[0].estimate - 1) / 4
    assert set(found.paired) == {"a", "b", "full"}
    text = shown(compare_report(found, metrics=("trace",), width=120), 120)
    assert f"×{ratio.low:.3g} … ×{ratio.high:.3g}" in text.replace(" 0", " ×0") and "paired jackknife" in text
    assert "Participation ratio (tr F)²/‖F‖² of the population" in text
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))["paired"]["full"]["trace"]
    assert plain == {"early": json.loads(json.dumps(ratio.to_dict()))}
    for name, result in results.items():
        (tmp_path / name).write_text(to_json(result))
    again = ff.compare({name: read_spectrum(tmp_path / name) for name in results})
    assert again.paired == found.paired


def test_effective_dimensions_are_paired_at_the_least_damping_that_both_resolve():
    results = {name: result_of(grams(seed)) for seed, name in enumerate(("init", "early"))}
    found = ff.compare(results)
    curves = [result.population.effective_dimension for result in results.values()]
    assert found.kappa == max(curve.kappa_min for curve in curves)
    each = found.of_population("full", "effective_dimension")
    for of, estimate in zip((grams(0), grams(1)), each, strict=True):
        (want,) = ff.population.effective_dimension(of, [found.kappa]).estimates  # by a curve of its own
        numbers = [(e.estimate, e.low, e.high) for e in (estimate, want)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02) and estimate.warning == want.warning
    ratio = found.paired["full"]["effective_dimension"]["early"]
    assert ratio.estimate == pytest.approx(each[1].estimate / each[0].estimate, rel=1e-12)
    apart = (each[1].high / each[1].low * each[0].high / each[0].low) ** 0.5
    assert ratio.high / ratio.low < apart and f"κ = {found.kappa:.3g}" in ratio.method
    text = shown(compare_report(found, metrics=("trace",), width=120), 120)
    assert f"Effective dimension Σλ/(λ + κ) of the population at κ = {found.kappa:.3g}" in text
    same = ff.compare({"one": results["init"], "other": results["init"]}).paired["full"]["effective_dimension"]["other"]
    assert (same.low, same.estimate, same.high) == (1, 1, 1)
    curve = results["early"].population.effective_dimension
    warned = replace(curve, estimates=tuple(replace(e, warning="not so") for e in curve.estimates))
    population = replace(results["early"].population, effective_dimension=warned)
    again = ff.compare(results | {"early": replace(results["early"], population=population)})
    assert again.paired["full"]["effective_dimension"]["early"].warning == "not so"
    unsaid = shown(compare_report(again, metrics=("trace",), width=120), 120)
    interval = f"×{ratio.low:#.3g} … ×{ratio.high:#.3g}"
    assert interval in text and interval not in unsaid
    left = results["init"].population.left_out
    assert paired_dimension(left, left, 0.9 * min(left.dimensions)) is None
    assert paired_dimension(left, left, 1.1 * max(left.dimensions)) is None


def test_results_on_other_tokens_or_clusters_or_without_estimates_have_no_paired_ratios():
    one, other = result_of(grams(1)), result_of(grams(2), clusters=[s // 2 for s in range(8)])
    assert ff.compare({"one": one, "other": other}).paired == {}
    assert ff.compare({"one": one, "other": result_of(grams(2).select(SEQUENCE > 0))}, across={"tokens"}).paired == {}
    assert ff.compare({"one": one, "other": replace(one, population=None)}).paired == {}
    assert ff.compare({"one": grams(1), "other": grams(2)}, blocks=by_parameter).paired == {}
    assert ff.compare({"one": grams(1), "other": grams(2)}, blocks=by_parameter, population=True).paired.keys() == {
        *("a", "b", "full")
    }


def test_a_block_that_a_result_lacks_has_no_ratio_there():
    """Three results, of which the last calls its blocks by other names: the ratio of the full matrix is there alone."""
    results = {name: result_of(grams(seed)) for seed, name in enumerate(("one", "two"))}
    results["other"] = ff.spectrum_of_grams(grams(2), blocks=lambda name: f"{name}'", population=True)
    found = ff.compare(results, across={"blocks"})
    assert found.paired["a"]["trace"]["two"] is not None and found.paired["a"]["trace"]["other"] is None
    assert found.paired["full"]["trace"]["other"] is not None
    assert "None" not in shown(compare_report(found, metrics=("trace",), width=160), 160)


def test_left_out_values_survive_json():
    found = ff.population.summary(grams(1)).left_out
    assert len(found.dimensions) > 1
    assert LeftOut.from_dict(json.loads(json.dumps(found.to_dict()))) == found
