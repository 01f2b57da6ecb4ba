"""No interval leaves its metric's range, or its estimate out without a word; where none is honest, there is none."""

import json
from dataclasses import replace

import pytest
import torch
from builders import grams_of
from consoles import shown
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfunc as ff
from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.records.provenance import Provenance
from fisherfunc.statistics import Intervals, bootstrap, jackknife
from fisherfunc.statistics.resampling.interval import OUTSIDE
from fisherfunc.surface.files import read_spectrum, to_json
from fisherfunc.surface.plots.compare_plots import plot_comparison
from fisherfunc.surface.reports.compare_report import compare_report
from fisherfunc.surface.reports.report import report
from fisherfunc.testing import gradient_trees

METHODS = {"jackknife": jackknife, "bootstrap": lambda grams, **o: bootstrap(grams, num_replicates=30, **o)}
METHODS |= {
    kind: lambda grams, kind=kind, **o: bootstrap(grams, num_replicates=30, method=kind, **o)
    for kind in ("basic", "percentile")
}
every_method = pytest.mark.parametrize("interval", METHODS.values(), ids=METHODS)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OWN = {"trace": SUMMARY["trace"], **{f"own {n}": lambda s, m=m: m(s) for n, m in SUMMARY.items()}}


def check(found):
    for name, i in found.items():
        if not i.known:
            assert i.standard_error is None and i.bias is None and i.corrected is None
            assert i.note and i.note != OUTSIDE, name
            assert i.estimate is None or i.low <= i.estimate <= i.high
            assert (i.to_dict()["low"], i.to_dict()["high"]) == (None, None)
            continue
        assert i.low <= i.high and (name != "trace" or i.low >= 0), (name, i)
        assert (i.low <= i.estimate <= i.high) == (i.note is None), (name, i)
        assert i.note in (None, OUTSIDE)


@every_method
@settings(max_examples=15)
@given(gradient_trees(max_rows=9), st.integers(1, 3), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_no_interval_leaves_the_range_of_its_metric(interval, tree, size, center, dtype):
    num_rows = len(next(iter(tree.values())))
    sequence = torch.arange(num_rows) // size
    if len(sequence.unique()) < 2:
        sequence, tree = torch.arange(2 * num_rows), {name: torch.cat([g, 2 * g]) for name, g in tree.items()}
    grams = replace(grams_of(tree, sequence=sequence), precision=dtype)
    found = interval(grams.center() if center else grams, blocks=ff.by_parameter, metrics=OWN)
    for of in (*found.blocks.values(), found.full, found.block_diagonal):
        check(of)
    plain = interval(grams, blocks=ff.by_parameter)
    assert Intervals.from_dict(json.loads(json.dumps(plain.to_dict(), allow_nan=False))) == plain


def decaying(num_rows=300, num_params=60, power=1.0):
    return gaussian(num_rows, num_params) * torch.arange(1, num_params + 1).double() ** (-power / 2)


def test_an_interval_that_leaves_its_estimate_out_says_so():
    found = jackknife(grams_of({"w": decaying(40, 300, power=0.7)}), level=0.5, metrics=OWN).full
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
    known = Provenance(loss="mine", batch="one", fisher="empirical")
    grams = {name: replace(grams_of(tree), provenance=known) for name, tree in trees.items()}
    result = ff.spectrum_of_grams(grams["x"], blocks=ff.by_parameter, intervals="jackknife")
    (tmp_path / "spectrum.json").write_text(to_json(result))
    assert read_spectrum(tmp_path).intervals == result.intervals
    text = shown(report(result, width=200), 200)
    gaps = [label for label, of in {"a.w": result.intervals.blocks["a.w"]}.items() if not of["effective_rank"].known]
    assert gaps == ["a.w"] and "no interval of " in text and "eff. rank in all" in text
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
        return jackknife(grams, metrics={"trace": SUMMARY["trace"]}, **how)

    found = ff.spectrum_of_grams(grams_of({"w": gaussian(9, 4)}), intervals=of_the_trace)
    assert "95% intervals by jackknife" in shown(report(found, width=200), 200)
