"""No interval leaves its metric's range, or its estimate out without a word; where none is honest, there is none."""

import json
import math
from dataclasses import replace

import pytest
import torch
from builders import grams_of
from consoles import shown
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfunc as ff
from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.statistics import Intervals, bootstrap, jackknife
from fisherfunc.statistics.interval import OUTSIDE
from fisherfunc.surface.compare_plots import plot_comparison
from fisherfunc.surface.compare_report import compare_report
from fisherfunc.surface.files import read_spectrum, to_json
from fisherfunc.surface.report import report
from fisherfunc.testing import gradient_trees

METHODS = {"jackknife": jackknife, "bootstrap": lambda grams, **o: bootstrap(grams, num_replicates=30, **o)}
METHODS |= {
    kind: lambda grams, kind=kind, **o: bootstrap(grams, num_replicates=30, method=kind, **o)
    for kind in ("basic", "percentile")
}
every_method = pytest.mark.parametrize("interval", METHODS.values(), ids=METHODS)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def allowed(num_params):
    """By hand: from what each metric is of eigenvalues λ_1 ≥ λ_2 ≥ … ≥ 0, P of them."""
    rank, size = (1.0, float(num_params)), (0.0, math.inf)
    return {
        **dict.fromkeys(("largest", "second", "smallest", "gap", "trace"), size),
        **dict.fromkeys(("effective_rank", "stable_rank", "participation_ratio"), rank),
        "relative_gap": (0.0, 1.0),
        "condition_number": (1.0, math.inf),
        "numerical_rank": (0.0, float(num_params)),
    }


def check(found, num_params):
    ranges = allowed(num_params)
    for name, i in found.items():
        if not i.known:
            assert i.standard_error is None and i.bias is None and i.corrected is None
            assert i.note and i.note != OUTSIDE, name
            low, high = ranges.get(name, (0.0, math.inf))
            assert i.low <= low and i.high >= high  # all that it can be, so that no one is misled
            assert i.estimate is None or i.low <= i.estimate <= i.high
            assert (i.to_dict()["low"], i.to_dict()["high"]) == (None, None)
            continue
        low, high = ranges.get(name, (0.0, math.inf))
        low = min(low, i.estimate) if found["trace"].estimate == 0 else low  # ranks of a zero spectrum are 0
        slack = 1e-9 * max(1.0, abs(i.estimate))  # round-off of the estimate itself
        assert low - slack <= i.low <= i.high <= high + slack, (name, i)
        assert (i.low <= i.estimate <= i.high) == (i.note is None), (name, i)
        assert i.note in (None, OUTSIDE)
    if found["gap"].known and found["largest"].known:
        most = max(found["largest"].high, found["gap"].estimate)
        assert found["gap"].high <= most * (1 + 1e-12)


@every_method
@settings(max_examples=15)
@given(gradient_trees(max_rows=9), st.integers(1, 3), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_no_interval_leaves_the_range_of_its_metric(interval, tree, size, center, dtype):
    num_rows = len(next(iter(tree.values())))
    sequence = torch.arange(num_rows) // size
    if len(sequence.unique()) < 2:
        sequence, tree = torch.arange(2 * num_rows), {name: torch.cat([g, 2 * g]) for name, g in tree.items()}
    grams = replace(grams_of(tree, sequence=sequence), precision=dtype)
    found = interval(grams.center() if center else grams, blocks=ff.by_parameter)
    sizes = {name: g[0].numel() for name, g in tree.items()}
    for name, of in found.blocks.items():
        check(of, sizes[name])
    check(found.full, sum(sizes.values()))
    check(found.block_diagonal, sum(sizes.values()))
    assert Intervals.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def decaying(num_rows=300, num_params=60, power=1.0):
    return gaussian(num_rows, num_params) * torch.arange(1, num_params + 1).double() ** (-power / 2)


@every_method
def test_a_rank_that_the_resolution_sets_has_no_interval_and_nothing_that_rests_on_it(interval):
    """Eigenvalues over twelve decades, in float32: which are resolved depends on the sequences."""
    rows = gaussian(40, 40) * 10 ** -torch.linspace(0, 6, 40, dtype=torch.float64)
    found = interval(replace(grams_of({"w": rows}), precision=torch.float32)).full
    for name in ("numerical_rank", "smallest", "condition_number"):
        assert not found[name].known and "numerical rank" in found[name].note and found[name].estimate is not None


@every_method
def test_where_all_eigenvalues_are_resolved_the_smallest_has_an_interval(interval):
    found = interval(grams_of({"w": gaussian(60, 4)})).full
    assert (found["numerical_rank"].low, found["numerical_rank"].high) == (4.0, 4.0)
    for name in ("smallest", "condition_number"):
        assert found[name].low < found[name].high and found[name].note in (None, OUTSIDE)
    assert found["condition_number"].low >= 1


@every_method
def test_eigenvalues_that_meet_have_no_interval_of_their_gap(interval):
    """Equal variances: the gap of the sample is all noise."""
    found = interval(grams_of({"w": gaussian(300, 6)})).full
    for name in ("gap", "relative_gap"):
        assert not found[name].known
        assert "not told from zero" in found[name].note or "out of its range" in found[name].note
    apart = interval(grams_of({"w": gaussian(300, 6) * torch.tensor([5.0, 1, 1, 1, 1, 1], dtype=torch.float64)})).full
    assert 0 < apart["relative_gap"].low < 24 / 25 < apart["relative_gap"].high <= 1  # the population's: 1 - 1/25
    assert 0 < apart["gap"].low < apart["gap"].high <= apart["largest"].high


@every_method
def test_a_rank_that_the_number_of_rows_sets_has_no_interval(interval):
    few, many = (interval(grams_of({"w": decaying(count, 200, power=0.5)})).full for count in (20, 400))
    for name in ("effective_rank", "participation_ratio"):
        assert not few[name].known and "number of rows" in few[name].note
        assert many[name].known or "number of rows" in many[name].note
    assert interval(grams_of({"w": decaying(400, 20)})).full["effective_rank"].known


def test_an_interval_that_leaves_its_estimate_out_says_so():
    found = jackknife(grams_of({"w": decaying(40, 300, power=0.7)}), level=0.5).full
    outside = [i for i in found.values() if i.known and not i.low <= i.estimate <= i.high]
    assert outside and all(i.note == OUTSIDE for i in outside)


def test_functions_of_the_users_own_have_any_range():
    found = jackknife(grams_of({"w": gaussian(9, 4)}), metrics={"mine": lambda s: -ff.metrics.trace(s)}).full["mine"]
    assert found.low < found.estimate < found.high < 0 and found.note is None


def test_constants_have_no_round_off_for_an_interval():
    rows = torch.eye(6, 12, dtype=torch.float64)
    found = bootstrap(
        grams_of({"w": torch.cat([rows, rows])}), metrics={"three": lambda s: s.resolution * 0 + 3.3}
    ).full
    assert (found["three"].low, found["three"].high, found["three"].standard_error) == (3.3, 3.3, 0.0)


def test_intervals_that_are_not_there_survive_files_tables_and_comparisons(tmp_path):
    trees = {name: {"a.w": gaussian(20, 30, seed=n), "b.w": gaussian(20, 3, seed=9 + n)} for n, name in enumerate("xy")}
    known = {"loss": "mine", "batch": "one", "fisher": "empirical"}
    grams = {name: replace(grams_of(tree), metadata=known) for name, tree in trees.items()}
    result = ff.spectrum_of_grams(grams["x"], blocks=ff.by_parameter, intervals="jackknife")
    (tmp_path / "spectrum.json").write_text(to_json(result))
    assert read_spectrum(tmp_path).intervals == result.intervals
    text = shown(report(result, width=200), 200)
    gaps = [label for label, of in {"a.w": result.intervals.blocks["a.w"]}.items() if not of["effective_rank"].known]
    assert gaps == ["a.w"] and "no interval of " in text and "eff. rank in a.w" in text
    lines = text.splitlines()
    (start,) = [index for index, line in enumerate(lines) if line.startswith("a.w ")]
    assert lines[start + 1].split()[-2] == lines[start + 2].split()[-2] == "–"
    old = json.loads(to_json(result))
    for of in (*old["intervals"]["per_block"].values(), old["intervals"]["global"], old["intervals"]["full"]):
        for entries in of.values():
            del entries["note"]  # a file of an older version
    (tmp_path / "spectrum.json").write_text(json.dumps(old))
    assert read_spectrum(tmp_path).intervals.full["trace"].note is None

    both = ff.compare(grams, blocks=ff.by_parameter, intervals="jackknife")
    assert (
        json.loads(json.dumps(both.to_dict(), allow_nan=False))["intervals"]["a.w"]["effective_rank"]["x"]["low"]
        is None
    )
    table = shown(compare_report(both, metrics=list(SUMMARY)), 200)
    assert "None" not in table and "x: no interval of " in table

    plot_comparison(both, metrics=list(SUMMARY))


def test_a_table_of_intervals_of_one_metric_is_shown():
    def of_the_trace(grams, **how):
        return jackknife(grams, metrics={"trace": SUMMARY["trace"]}, num_leading=0, **how)

    found = ff.spectrum_of_grams(grams_of({"w": gaussian(9, 4)}), intervals=of_the_trace)
    assert "95% intervals by jackknife" in shown(report(found, width=200), 200)
