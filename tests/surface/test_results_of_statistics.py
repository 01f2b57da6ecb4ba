"""Couplings, sample limits and intervals in results: the same as from the functions, in files, table and plots."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from builders import grams_of
from commands import run, tiny
from consoles import shown
from spectra import spectrum as result_of_rows

import fisherfunc as ff
from fisherfunc.partitioning import by_parameter, whole
from fisherfunc.pipeline.result import limits_of
from fisherfunc.statistics import block_coupling, bootstrap, jackknife, sample_limits
from fisherfunc.surface.files import read_spectrum, to_json
from fisherfunc.surface.plots.coupling_plot import WRITTEN_LIMIT, plot_couplings
from fisherfunc.surface.plots.plots import rendered
from fisherfunc.surface.reports.report import report

SEQUENCE = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRAMS = grams_of({"a": gaussian(8, 30), "b": gaussian(8, 2, seed=1)}, sequence=SEQUENCE)


def result_of(**options):
    return ff.spectrum_of_grams(GRAMS, blocks=by_parameter, **options)


def printed(result, width=160):
    return shown(report(result, width=width), width)


@pytest.mark.parametrize("center", [False, True])
def test_a_result_has_the_couplings_and_limits_of_its_grams(center):
    result = result_of(center=center)
    assert result.coupling == block_coupling(GRAMS, blocks=by_parameter, center=center)
    plain = result.to_dict()
    assert plain["couplings"] == result.coupling.to_dict() and plain["intervals"] is None
    for label, part in result.blocks.items():
        assert plain["sample_limits"]["per_block"][label] == sample_limits(part, centered=center).to_dict()
    assert plain["sample_limits"]["full"]["rank_ceiling"] == 8 - center
    assert limits_of(result, result.blocks["b"]).rank_ceiling == 2


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_intervals_of_a_result_are_those_of_the_functions(unit):
    grams = GRAMS.by_sequence() if unit == "sequence" else GRAMS
    found = {method: result_of(unit=unit, intervals=method).intervals for method in ("bootstrap", "jackknife")}
    assert found == {f.__name__: f(grams, blocks=by_parameter) for f in (bootstrap, jackknife)}
    own = result_of(intervals=partial(bootstrap, level=0.5, num_replicates=20)).intervals
    assert own == bootstrap(GRAMS, blocks=by_parameter, level=0.5, num_replicates=20)


@pytest.mark.parametrize("intervals", [None, "jackknife"])
def test_a_file_gives_back_couplings_and_intervals(tmp_path, intervals):
    result = result_of(intervals=intervals)
    (tmp_path / "spectrum.json").write_text(to_json(result))
    again = read_spectrum(tmp_path)
    assert (again.coupling, again.intervals) == (result.coupling, result.intervals)
    assert again.to_dict() == result.to_dict() == json.loads(json.dumps(result.to_dict(), allow_nan=False))


def test_a_file_of_an_older_version_is_read(tmp_path):
    content = json.loads(to_json(result_of()))
    for key in ("sample_limits", "couplings", "intervals"):
        del content[key]
    (tmp_path / "spectrum.json").write_text(json.dumps(content))
    assert read_spectrum(tmp_path).coupling is None and read_spectrum(tmp_path).intervals is None


def test_intervals_of_one_sequence_and_unknown_ones_are_errors_before_the_pass():
    model, batch = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    calls = []
    for one, choice, message in [
        (tuple(part[:1] for part in batch), "jackknife", "at least 2 sequences, and the batch has one"),
        (batch, "exact", r"one of \['bootstrap', 'jackknife'\].*got intervals='exact'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ff.fisher_spectrum(model, one, intervals=choice, progress=lambda *done: calls.append(done))
    assert not calls
    assert ff.fisher_spectrum(model, batch, intervals="jackknife").intervals.full["trace"].method == "jackknife"


def test_the_table_shows_the_ends_of_intervals_under_each_matrix():
    result = result_of(intervals="jackknife")
    lines = printed(result).splitlines()
    named = {**result.intervals.blocks, "block-diagonal": result.intervals.block_diagonal}
    for label, found in {**named, "full matrix": result.intervals.full}.items():
        (start,) = [index for index, line in enumerate(lines) if line.startswith(label + " ")]
        for line, end in zip(lines[start + 1 : start + 3], ("low", "high"), strict=True):
            name, *figures = line.split()
            assert name == end and float(figures[-1]) == pytest.approx(getattr(found["trace"], end), rel=1e-3)
            assert len(figures) == 6
    assert "low, high: 95% intervals by jackknife over 4 sequences" in printed(result)
    assert not re.search(r"^ +low", printed(result_of()), re.MULTILINE) and "intervals" not in printed(result_of())


def test_the_table_says_which_numbers_the_sample_sets_and_of_which_matrices():
    text = printed(result_of())
    assert "eff. rank: set by the number of tokens, 8, as much as by the model, in a, full matrix" in text
    assert "condition number: set by the number of tokens, 8, as much as by the model, in a, full matrix" in text
    alone = printed(ff.spectrum_of_grams(GRAMS, blocks=whole))
    assert re.search(r"eff\. rank: .*, in all$", alone, re.MULTILINE)
    many = grams_of({f"layer.{i}": gaussian(4, 9, seed=i) for i in range(6)})
    assert "in 7 matrices, layer.0 … full matrix" in printed(ff.spectrum_of_grams(many, blocks=by_parameter))
    enough = grams_of({"w": gaussian(200, 3)})
    assert "set by the number" not in printed(ff.spectrum_of_grams(enough))


def test_the_table_says_what_the_block_diagonal_matrix_leaves_out():
    result = result_of()
    error = result.coupling.block_diagonal_error
    assert f"leaves out {error:.1%} of the full one" in printed(result)
    assert "leaves out" not in printed(ff.spectrum_of_grams(GRAMS, blocks=whole))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [None, "/a/folder/with/a/name/as/long/as/folders/can/have/them/gpt2"])
@pytest.mark.parametrize("count", [2, WRITTEN_LIMIT, 40])
def test_the_heat_map_is_the_alignment(count, name):
    tree = {f"layer.{index}.attention.weight": gaussian(6, 4, seed=index) for index in range(count)}
    result = ff.spectrum_of_grams(grams_of(tree), blocks=by_parameter)
    result = replace(result, provenance=replace(result.provenance, model_id=name))
    figure = plot_couplings(result)
    (image,) = figure.axes[0].get_images()
    assert torch.tensor(image.get_array().tolist()).equal(torch.tensor(result.coupling.alignment))
    written = [text.get_text() for text in figure.axes[0].texts[: count**2]]
    if count <= WRITTEN_LIMIT:
        assert written == [f"{value:.2f}" for row in result.coupling.alignment for value in row]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0].startswith("layer.0") and f"{count - 1}." in labels[-1]
    assert rendered(figure, "png") == rendered(plot_couplings(result), "png")
    title = figure.axes[0].get_title(loc="left")
    assert title == "Couplings in the empirical Fisher"


def test_the_population_stands_beside_the_sample_in_the_pictures():
    from fisherfunc.surface.plots.plots import plot_spectrum

    tree = {f"layer.{index}.w": 1 + gaussian(40, 3, seed=index) for index in range(3)}
    result = ff.spectrum_of_grams(grams_of(tree), blocks=by_parameter, population=True)
    figure = plot_couplings(result)
    assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["of these tokens", "of the population"]
    (image,) = figure.axes[1].get_images()
    want = [[entry.estimate for entry in row] for row in result.population.coupling.alignment]
    assert torch.tensor(image.get_array().tolist()).equal(torch.tensor(want))
    bracket = result.population.leading_eigenvalue
    (bar,) = [line for line in plot_spectrum(result).axes[0].lines if "population" in str(line.get_label())]
    assert list(bar.get_ydata()) == [bracket.low, bracket.high] and bracket.warning is None
    plain = plot_spectrum(replace(result, population=None))
    assert not [line for line in plain.axes[0].lines if "population" in str(line.get_label())]


def test_gradients_at_hand_have_no_couplings_to_draw():
    assert result_of_rows().coupling is None
    with pytest.raises(ValueError, match="no couplings"):
        plot_couplings(result_of_rows())
    assert result_of_rows().to_dict()["couplings"] is None


def test_the_option_of_the_command_reaches_the_result(hub, here):
    ran = run(*tiny(hub), "--tokens", 30, "--context", 8, "--blocks", "whole", "--intervals", "jackknife", "--out", "o")
    assert ran.exit_code == 0 and "low, high: 95% intervals by jackknife" in ran.stdout
    result = read_spectrum("o")
    assert result.intervals.full["trace"].num_sequences == result.metadata["num_sequences"]
    assert not (here / "o" / "couplings.png").exists()  # one block has nothing to be coupled to


def test_a_result_with_everything_is_still_a_tree_of_tensors():
    result = result_of(intervals="jackknife")
    moved = torch.utils._pytree.tree_map(lambda t: 2 * t, result)
    assert torch.equal(moved.full.eigenvalues, 2 * result.full.eigenvalues) and moved.coupling == result.coupling
    assert replace(result, coupling=None).coupling is None
