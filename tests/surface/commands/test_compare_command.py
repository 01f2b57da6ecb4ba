"""`fisherfunc compare`: numbers and picture of results side by side; what is wrong is one line, and nothing is left."""

import dataclasses
import json
import math
import re

import pytest
import torch
from click.testing import CliRunner
from consoles import shown
from spectra import known_grams, spectrum
from spectra import random_rows as gradients

import fisherfunc as ff
from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.surface.cli import cli
from fisherfunc.surface.files import read_spectrum, to_json, write_files
from fisherfunc.surface.jobs import compare_job, job
from fisherfunc.surface.plots.compare_plots import PANELS, plot_comparison
from fisherfunc.surface.plots.plots import rendered
from fisherfunc.surface.reports.compare_report import HEADINGS, compare_report

FILES = ["comparison.json", "comparison.png", "comparison.svg", "run.toml"]
DEFAULTS = ("largest", "trace", "effective_rank")


def run(*arguments):
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)], prog_name="fisherfunc")


def result(seed=0, labels=("embedding", "layer.0", "output"), **facts):
    return spectrum(labels, **{"scale": 1.0 + seed, "tokens": "0123", "model_id": f"tiny/{seed}", **facts})


def written(folder, found):
    write_files(folder, {"spectrum.json": to_json(found)})
    return folder


@pytest.fixture
def folders(here):
    return [written(here / "run" / name, result(seed)) for seed, name in enumerate(("before", "after"))]


@pytest.fixture
def undrawn(monkeypatch):
    """An empty picture, which takes no time."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(compare_job, "plot_comparison", lambda *_, **__: Figure(figsize=(1, 1)))


def rows(text, heading):
    """{block: its cells} of the table below a heading."""
    block = text.split(heading)[1].split("\n\n")[0] if heading in text else ""
    lines = [re.split(r"  +", line.strip()) for line in block.splitlines()[3:]]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 1}


def test_the_tables_hold_the_numbers_and_their_ratios_and_the_files_hold_them_all(folders, here):
    ran = run(*folders)
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert sorted(path.name for path in (here / "comparison").iterdir()) == FILES
    want = ff.compare({folder.name: read_spectrum(folder) for folder in folders})
    assert json.loads((here / "comparison" / "comparison.json").read_text()) == want.to_dict()
    names = {"block_diagonal": "block-diagonal", "full": "full matrix"}
    for metric in DEFAULTS:
        table = rows(ran.stdout, HEADINGS[metric])
        assert set(table) == {names.get(label, label) for label in want.values}
        for label, values in want.values.items():
            first, second, ratio = table[names.get(label, label)]
            assert float(first) == pytest.approx(values[metric]["before"], rel=1e-3)
            assert float(second) == pytest.approx(values[metric]["after"], rel=1e-3)
            assert float(ratio.removeprefix("×")) == pytest.approx(want.ratios[label][metric]["after"], rel=1e-2)
    for part in ("tiny/0", "tiny/1", "6 tokens", "3.250", "over the value of 'before'", "F = (1/N) GᵀG"):
        assert part in ran.stdout
    assert not re.search(r"(?i)(?<!empirical )fisher", ran.stdout)


def test_json_is_printed_alone_and_quiet_prints_nothing(folders, undrawn):
    ran = run(*folders, "--format", "json", "--out", "there")
    assert json.loads(ran.stdout)["values"]["full"]["trace"].keys() == {"before", "after"}
    assert ran.stderr == f"wrote {', '.join(FILES)} into there\n"
    assert run(*folders, "--quiet").output == ""


def test_metrics_are_those_asked_for(folders, undrawn):
    ran = run(*folders, "--metric", "condition_number", "--metric", "stable_rank")
    shown = [name for name in SUMMARY if HEADINGS[name] in ran.stdout]
    assert shown == ["condition_number", "stable_rank"]
    assert set(HEADINGS) == set(SUMMARY)


def test_a_recorders_folders_are_results(here, undrawn):
    model, probe = torch.nn.Linear(4, 3), (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    record = ff.SpectrumRecorder(probe, every=5, folder="kept")
    for step in range(11):
        record(model, step)
    ran = run(*sorted((here / "kept").iterdir()))
    assert ran.exit_code == 0, ran.stderr
    found = json.loads((here / "comparison" / "comparison.json").read_text())
    assert list(found["results"]) == ["step-00000000", "step-00000005", "step-00000010"]
    assert set(found["ratios"]["full"]["trace"].values()) == {1.0}
    assert [facts["step"] for facts in found["results"].values()] == [0, 5, 10]


def test_checkpoints_are_computed_with_the_defaults_unless_a_folder_is_called_so(here, undrawn, monkeypatch):
    jobs = []

    def compute(task, progress):
        jobs.append(task)
        return result(len(jobs))

    monkeypatch.setattr(job, "compute", compute)
    written(here / "middle", result(7))
    assert run("init", "middle", "final").exit_code == 0
    assert jobs == [job.Job(checkpoint="init"), job.Job(checkpoint="final")]
    found = json.loads((here / "comparison" / "comparison.json").read_text())
    assert found["results"]["middle"]["model_id"] == "tiny/7"


def test_what_differs_is_refused_until_it_is_asked_for(folders, undrawn, here):
    other = written(here / "other", result(2, tokens="4567"))
    ran = run(folders[0], other)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert re.fullmatch(
        r"fisherfunc: error: results that differ cannot be compared: tokens: '0123' of 'before', '4567' of 'other'; "
        r"allowed where across names them: tokens\n",
        ran.stderr,
    )
    assert not (here / "comparison").exists()
    allowed = run(folders[0], other, "--across", "tokens")
    assert allowed.exit_code == 0
    assert "Results differ in tokens: 0123 (before), 4567 (other)" in allowed.stdout


FAILURES = {
    "one result": (["run/before"], 1, r"compare needs two results or more, got run/before"),
    "no result": ([], 2, r"Missing argument 'RESULT RESULT\.\.\.'"),
    "absent": (["run/before", "none"], 1, r"no result 'none': expected a folder .*\(init, early, middle, final\)"),
    "twice": (["run/before", "run/before/spectrum.json"], 1, r"run/before is given twice"),
    "a folder without": (["run/before", "run"], 1, r"run/spectrum\.json: No such file"),
    "damaged": (["run/before", "bad.json"], 1, r"bad\.json is not valid JSON"),
    "no such metric": (["run/before", "run/after", "--metric", "rank"], 2, r"'rank' is not one of 'largest'"),
    "never across": (["run/before", "run/after", "--across", "unit"], 2, r"'unit' is not one of 'tokens'"),
    "out": (["run/before", "run/after", "--out", "bad.json/x"], 1, r"cannot write into the output folder bad\.json/x"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_one_line_and_nothing_is_left(folders, here, what):
    arguments, status, message = FAILURES[what]
    (here / "bad.json").write_text("{")
    before = sorted(here.rglob("*"))
    ran = run(*arguments)
    assert (ran.exit_code, ran.stdout, ran.stderr.count("\n")) == (status, "", 1)
    assert ran.stderr.startswith("fisherfunc: error: ") and re.search(message, ran.stderr)
    assert sorted(here.rglob("*")) == before


def test_an_interrupt_leaves_nothing(folders, here, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_job, "read_spectrum", stop)
    ran = run(*folders)
    assert (ran.exit_code, ran.stderr.strip()) == (130, "fisherfunc: interrupted; nothing was written")
    assert not (here / "comparison").exists()


def test_the_help_names_every_option_and_fits_80_columns():
    text = run("--help").stdout
    for option in cli.commands["compare"].params[1:]:
        assert option.opts[0] in text
    assert max(map(len, text.splitlines())) <= 80
    assert "compare" in CliRunner().invoke(cli, []).stdout


def printed(found, width=120, metrics=DEFAULTS):
    return shown(compare_report(found, metrics=metrics), width)


def test_what_does_not_exist_is_a_dash_and_markup_is_not_interpreted():
    found = ff.compare({"[bold]x": result(labels=("a", "b")), "y": result(1, labels=("b", "c"))})
    text = printed(found)
    assert "[bold]x" in text
    assert rows(text, HEADINGS["trace"])["a"][1] == "–"
    assert rows(text, HEADINGS["trace"])["c"][0] == "–"


def test_an_alignment_is_printed_where_there_is_one():
    grams = {name: known_grams({n: 1 + gradients(seed) for n in ("h.0.w", "h.1.w")}) for seed, name in enumerate("xy")}
    found = ff.compare(grams)
    table = rows(printed(found), "Centred kernel alignment of the token Grams with those of 'x'")
    assert set(table) == {"layer.0", "layer.1", "full matrix"}
    assert float(table["full matrix"][1]) == pytest.approx(float(found.similarity["full"][0, 1]), abs=6e-4)
    plain = ff.compare({"x": result(), "y": result(1)})
    assert "Centred" not in printed(plain) and "Overlap" not in printed(plain)
    overlap = dataclasses.replace(plain, overlaps={"layer.0": torch.tensor([[1.0, 0.25], [0.25, 1.0]])})
    table = rows(printed(overlap), "Overlap of the leading subspaces with those of 'x'")
    assert table == {"layer.0": ["1.000", "0.250"]}


def test_intervals_are_printed_below_and_drawn_as_bands_and_what_the_sample_sets_is_said():
    grams = {name: known_grams({n: 1 + gradients(seed) for n in ("h.0.w", "h.1.w")}) for seed, name in enumerate("xy")}
    found = ff.compare(grams, intervals="jackknife")
    text = printed(found)
    low, high = (getattr(found.intervals["full"]["trace"]["y"], end) for end in ("low", "high"))
    below = text.split(HEADINGS["trace"])[1].split("full matrix")[1].splitlines()[1]
    assert below.split("  ")[-1].strip() == f"{low:.2e} … {high:.2e}"
    assert "y: low, high: 95% intervals by jackknife over 6 sequences" in text
    assert re.search(r"x: eff\. rank: set by the number of tokens, 6", text)
    assert "eff. rank" not in printed(found, metrics=("trace",))
    assert f"{found.couplings['x'].block_diagonal_error:.1%}" in text
    bands = plot_comparison(found, metrics=("trace",)).subfigs[2].axes[0].collections
    assert len(bands) == len(found.values)
    assert bands[-1].get_datalim(bands[-1].axes.transData).intervaly.max() == pytest.approx(
        max(i.high for i in found.intervals["full"]["trace"].values())
    )
    assert not plot_comparison(ff.compare(grams), metrics=("trace",)).subfigs[2].axes[0].collections


def test_an_interval_far_beyond_all_values_does_not_set_the_axis():
    plain = ff.compare({"x": result(labels=("a",)), "y": result(1, labels=("a",))})
    wide = ff.statistics.Interval(
        estimate=1.0,
        low=1e-9,
        high=1e9,
        standard_error=1.0,
        bias=0.0,
        level=0.9,
        method="any",
        num_sequences=2,
    )
    intervals = {label: {m: dict.fromkeys(("x", "y"), wide) for m in SUMMARY} for label in plain.values}
    limits = [
        plot_comparison(found, metrics=("trace",)).subfigs[2].axes[0].get_ylim()
        for found in (plain, dataclasses.replace(plain, intervals=intervals))
    ]
    assert limits[0] == limits[1]


def test_the_picture_has_a_panel_a_block_with_a_line_a_result_and_says_which_fisher():
    found = ff.compare({"x": result(), "y": result(1)})
    figure = plot_comparison(found, metrics=("largest", "effective_rank"))
    head, above, below = figure.subfigs
    assert [text.get_text() for text in head.texts] == [
        "Spectra of the empirical Fisher",
        "tiny/0, tiny/1  ·  6 tokens  ·  causal_lm",
    ]
    titles = [axes.get_title(loc="left") for axes in above.axes if axes.axison]
    assert titles == ["embedding", "layer.0", "output", "full matrix"]
    drawn = above.axes[0].get_lines()
    for name, curve in zip(found.names, drawn, strict=True):
        assert curve.get_label() == name
        assert torch.equal(torch.tensor(curve.get_ydata()), found.results[name].blocks["embedding"].eigenvalues)
    assert above.axes[0].get_ylabel() == r"eigenvalue $\lambda_k$ (nats²)" and above.axes[0].get_xlabel() == "rank $k$"
    assert [axes.get_ylabel() for axes in below.axes] == [r"largest eigenvalue $\lambda_1$ (nats²)", "effective rank"]
    assert [text.get_text() for text in below.axes[0].get_xticklabels()] == ["x", "y"]
    values = dict(zip(found.values, (c.get_ydata().tolist() for c in below.axes[0].get_lines()), strict=True))
    assert values == {label: list(metrics["largest"].values()) for label, metrics in found.values.items()}
    assert rendered(figure, "png") == rendered(plot_comparison(found, metrics=("largest", "effective_rank")), "png")


def test_the_picture_has_the_population_within_bands_and_no_band_where_an_interval_has_a_warning():
    model, batch = torch.nn.Linear(4, 3), (1 + torch.randn(20, 4), torch.arange(20) % 3)
    one, other = (ff.fisher_spectrum(model.double(), (scale * batch[0].double(), batch[1])) for scale in (1, 2))
    ratios = other.population.participation_ratio
    warned = type(ratios)(ratios, dataclasses.replace(ratios.full, warning="too short"))
    other = dataclasses.replace(other, population=dataclasses.replace(other.population, participation_ratio=warned))
    found = ff.compare({"one": one, "other": other}, across={"tokens"})
    *_, panel = plot_comparison(found, metrics=("trace",)).subfigs
    axes = {part.get_title(loc="left"): part for part in panel.axes}
    ratio, bracket = axes["participation ratio"], axes[r"largest eigenvalue $\lambda_1$"]
    full = [line.get_ydata().tolist() for line in ratio.lines][-1]
    assert full == [one.population.participation_ratio.full.estimate, ratios.full.estimate]

    def ends(axes):
        """Of the bars, the last ones: those of the full matrix; none where there is no number."""
        bars = [part.get_segments() for part in axes.collections if hasattr(part, "get_segments")][-1]
        return [[y for _, y in part.tolist() if math.isfinite(y)] for part in map(torch.as_tensor, bars)]

    held = one.population.participation_ratio.full
    assert ends(ratio) == [[held.low, held.high], []]
    brackets = [r.population.leading_eigenvalue for r in (one, other)]
    assert ends(bracket) == [[e.low, e.high] if e.warning is None else [] for e in brackets]
    assert all(math.isnan(value) for value in bracket.lines[-1].get_ydata())  # ends, and no point


def test_without_estimates_the_picture_has_no_panel_of_the_population():
    found = ff.compare({"one": result(), "other": result(1)})
    assert len(plot_comparison(found, metrics=("trace",)).subfigs) == 3


def test_many_blocks_have_the_panels_of_the_largest_and_a_colour_bar():
    labels = tuple(f"block.{index}" for index in range(20))
    found = ff.compare({"x": result(labels=labels), "y": result(1, labels=labels)})
    figure = plot_comparison(found, metrics=DEFAULTS)
    titles = [axes.get_title(loc="left") for axes in figure.subfigs[1].axes if axes.axison]
    assert len(titles) == PANELS - 1 and titles[-1] == "full matrix"
    trace = {label: max(found.values[label]["trace"].values()) for label in labels}
    assert set(titles[:-1]) == set(sorted(labels, key=trace.get, reverse=True)[: PANELS - 2])
    assert any(axes.get_label() == "<colorbar>" for axes in figure.subfigs[2].axes)


@pytest.mark.parametrize(
    ("names", "places"),
    [((0, 100, 400), [0, 100, 400]), (("step-00000010", "step-00000030"), [10, 30]), ((5, 1), [0, 1])],
)
def test_steps_lie_at_their_numbers(names, places):
    found = ff.compare({name: result(seed, labels=("a",)) for seed, name in enumerate(names)})
    axes = plot_comparison(found, metrics=("trace",)).subfigs[2].axes[0]
    assert axes.get_lines()[0].get_xdata().tolist() == places
    assert axes.get_xlabel() == ("step" if places != [0, 1] else "result")


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"num_tokens": 1, "num_params": 1, "labels": ("all",)}], ids=str)
def test_there_is_a_picture_and_a_table_of_the_smallest_and_of_nothing(options):
    found = ff.compare({"x": result(**options), "y": result(**options)})
    assert rendered(plot_comparison(found, metrics=DEFAULTS), "png")
    assert "x" in printed(found, metrics=tuple(SUMMARY))
