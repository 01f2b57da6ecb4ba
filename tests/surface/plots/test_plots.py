"""The plots: what is drawn is what was computed, and the same every time."""

import sys
from xml.etree import ElementTree

import matplotlib
import pytest
from figures import open_figures
from spectra import spectrum, unresolved

import fisherfunc as ff
from fisherfunc.surface.plots.compare_plots import plot_comparison
from fisherfunc.surface.plots.plots import LEGEND_LIMIT, plot_spectrum, rendered, save_plot

MANY = tuple(f"layer.{index}.mlp.weight" for index in range(52))


def _line(figure, label):
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == label]
    return list(zip(*(data.tolist() for data in line.get_data()), strict=True))


def _points(part):
    return list(enumerate(part.eigenvalues.tolist(), start=1))


def test_the_lines_are_the_eigenvalues():
    result = spectrum(num_tokens=5, num_params=3)  # of full rank: nothing is below the resolution
    figure = plot_spectrum(result)
    for label, part in {**result.blocks, "block-diagonal": result.block_diagonal, "full matrix": result.full}.items():
        assert _line(figure, label) == _points(part)


def test_what_is_not_resolved_is_drawn_apart():
    result = spectrum(("a", "b"), num_tokens=30, num_params=40, centered=True)
    part = result.blocks["a"]
    floor = part.eigenvalues[10]
    coarse = type(part)(**{**vars(part), "resolution": floor})
    figure = plot_spectrum(type(result)(**{**vars(result), "blocks": {**result.blocks, "a": coarse}}))
    assert _line(figure, "a") == _points(part)[:10]
    faint = [line for line in figure.axes[0].get_lines() if line.get_alpha() is not None]
    assert _points(part)[10:] == list(zip(*(data.tolist() for data in faint[0].get_data()), strict=True))[1:]


def test_all_lines_are_in_view():
    result = spectrum(num_tokens=5, num_params=3)
    axes = plot_spectrum(result).axes[0]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    points = [point for part in (*result.blocks.values(), result.full) for point in _points(part)]
    assert all(left < rank < right and low < value < high for rank, value in points)


def test_a_resolution_above_all_eigenvalues_is_in_view_too():
    result = unresolved(spectrum())
    axes = plot_spectrum(result).axes[0]
    low, high = axes.get_ylim()
    assert low < result.full.eigenvalues[0] < result.full.resolution < high
    assert any(text.get_text() == "resolution of the full matrix" for text in axes.texts)


@pytest.mark.parametrize("labels", [("a", "b", "c"), MANY[:LEGEND_LIMIT], MANY])
def test_few_blocks_have_a_legend_and_many_a_colour_bar(labels):
    figure = plot_spectrum(spectrum(labels))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    few = len(labels) <= LEGEND_LIMIT
    assert names == [*(labels if few else ()), "block-diagonal", "full matrix"]
    assert len(figure.axes) == (1 if few else 2)
    if not few:
        ticks = [text.get_text() for text in figure.axes[1].get_yticklabels()]
        assert ticks[0] == labels[0]
        assert ticks[-1] == labels[-1]
    colors = [line.get_color() for line in figure.axes[0].get_lines() if line.get_label() in labels]
    assert len(set(colors)) == len(labels)


ODD = {
    "zero": {"scale": 0.0},
    "one token": {"num_tokens": 1},
    "one token, one parameter": {"num_tokens": 1, "num_params": 1, "labels": ("a",)},
    "one block": {"labels": ("whole",)},
    "many zero blocks": {"labels": MANY, "scale": 0.0},
    "tiny": {"scale": 1e-30},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", ODD)
def test_odd_spectra_are_drawn_without_a_warning(what):
    figure = plot_spectrum(spectrum(**ODD[what]))
    assert rendered(figure, "png").startswith(b"\x89PNG")
    assert (what.endswith("zero") or "zero" in what) == any("zero" in text.get_text() for text in figure.axes[0].texts)


def test_the_title_names_matrix_model_and_number():
    axes = plot_spectrum(spectrum()).axes[0]
    texts = [axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)]
    assert texts[0] == "Spectrum of the empirical Fisher"
    assert any("tiny/model" in text and "6 tokens" in text for text in texts)
    assert plot_spectrum(spectrum(centered=True)).axes[0].get_title(loc="left") == "Spectrum of the gradient covariance"


@pytest.mark.parametrize("labels", [("a", "b"), MANY])
def test_the_same_result_gives_the_same_bytes_whatever_the_users_settings(labels):
    first = plot_spectrum(spectrum(labels))
    pictures = {kind: rendered(first, kind) for kind in ("png", "svg")}
    with matplotlib.rc_context({"font.size": 30, "xtick.major.size": 20, "svg.hashsalt": "other"}):
        second = plot_spectrum(spectrum(labels))
        assert {kind: rendered(second, kind) for kind in reversed(pictures)} == pictures
    assert b"<dc:date>" not in pictures["svg"]


def test_no_global_state_is_touched():
    before, open_before = dict(matplotlib.rcParams), open_figures()
    rendered(plot_spectrum(spectrum()), "svg")
    assert dict(matplotlib.rcParams) == before and open_figures() == open_before


def test_both_files_are_written(tmp_path):
    paths = save_plot(plot_spectrum(spectrum()), tmp_path / "new" / "picture.png")
    assert [path.name for path in paths] == ["picture.png", "picture.svg"]
    assert ElementTree.parse(paths[1]).getroot().tag.endswith("svg")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["picture.png", "picture.svg"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "fisherfunc\[plot\]"'):
        plot_spectrum(spectrum())


def test_results_are_compared_in_a_picture_where_one_has_nothing_resolved():
    found = ff.compare({"x": spectrum(tokens="0"), "y": unresolved(spectrum(tokens="0"))})
    axes = plot_comparison(found, metrics=("trace",)).subfigs[1].axes[0]
    low, high = axes.get_ylim()
    assert low < min(part.eigenvalues[0] for part in found.results["y"].blocks.values()) < high
