"""Records on one screen, in a notebook, as data frames and as LaTeX: what is shown is what they hold."""

import math
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fisherfunc as ff
from fisherfunc.records.sheet import Sheet, as_html, as_text, figure, log_plot

LINES, LETTERS = 24, 120


def result_of(labels, rows=6):
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(rows, 3, generator=generator, dtype=torch.float64) for name in labels}
    return ff.spectrum_of_gradients(gradients, blocks=ff.by_parameter)


def shown():
    """A record of each kind."""
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
    fn, result = ff.functionalize(model), ff.fisher_spectrum(model, batch)
    grams = ff.token_grams(fn, fn.params, batch, ff.losses.classification())
    return [result, result.full, grams, ff.plan(model, batch), ff.compare({"a": result, "b": result})]


@pytest.mark.parametrize("count", [1, 14, 15, 300])
def test_a_result_of_any_number_of_blocks_is_one_screen(count):
    labels = [f"model.layers.{i}." + "x" * 60 * (i == 1) for i in range(count)]
    text = repr(result_of(labels))
    assert len(text.splitlines()) <= LINES and max(map(len, text.splitlines())) <= LETTERS
    assert re.search(r"^full ", text, re.MULTILINE) and "block_diagonal" in text
    assert ("more" in text) == (count + 2 > 14)


def test_every_record_is_one_screen_and_a_well_formed_part_of_a_page():
    for record in shown():
        text, page = repr(record), record._repr_html_()
        assert len(text.splitlines()) <= LINES and max(map(len, text.splitlines())) <= LETTERS
        root = ElementTree.fromstring(page)
        assert root.tag == "div" and "".join(root.itertext()).startswith(text.splitlines()[0])
        assert not re.search(r"<script|<style|src=|href=|url\(", page)


def test_the_figures_are_those_of_the_metrics():
    result = result_of(["a", "b"])
    row = next(line.split() for line in repr(result).splitlines() if line.startswith("full"))
    metrics = ff.metrics
    wanted = (metrics.largest, metrics.second, metrics.effective_rank, metrics.trace)
    assert row[1:] == ["6", "6", *(figure(metric(result.full).item()) for metric in wanted)]
    cells = [cell.text for cell in ElementTree.fromstring(result._repr_html_()).iter("td")]
    assert cells[-6:] == row[1:]


def test_names_are_shown_and_not_run():
    bad = '<script>alert("x")</script>&\x1b[31m\u202e'
    sheet = Sheet(title=bad, columns=("a", "b"), rows=[(bad, "1")], notes=[bad], lines={bad: [1.0]})
    page, text = as_html(sheet), as_text(sheet)
    assert '<script>alert("x")</script>&' in "".join(ElementTree.fromstring(page).itertext())
    assert "<script" not in page and not any(sign in page + text for sign in "\x1b\u202e")


@given(st.floats(0.2, 3), st.integers(2, 500), st.floats(-8, 8))
def test_a_power_law_is_drawn_as_a_straight_line(exponent, count, size):
    """λ_k = c k^-a is a line in log λ and log k, from the left end at rank 1; figures are rounded to 0.1 of a unit."""
    values = [10**size * k**-exponent for k in range(1, count + 1)]
    svg = ElementTree.fromstring(log_plot({"all": values}))
    path = next(element for element in svg.iter() if element.tag.endswith("polyline")).attrib["points"]
    points = [tuple(map(float, point.split(","))) for point in path.split()]
    (x0, y0), (x1, y1) = points[0], points[-1]
    assert x0 == 52.0 and all(0 <= x <= 420 and 0 <= y <= 230 for x, y in points)
    assert all(
        abs(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - y) <= 0.1 + 0.2 * abs((y1 - y0) / (x1 - x0)) for x, y in points
    )


def test_what_is_zero_or_alone_is_drawn():
    assert log_plot({"a": [0.0, 0.0]}) == "" and log_plot({}) == ""
    ElementTree.fromstring(log_plot({"a": [2.0]}))


def test_stacks_and_values_under_vmap_are_told_by_their_shape():
    seen = []

    def kernel(matrix):
        spectrum = ff.kernels.gram_eigh()(ff.Gram(matrix=matrix, num_units=2))
        seen.append(repr(spectrum))
        return spectrum

    stack = torch.func.vmap(kernel)(torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
    assert "shape (2,)" in seen[0] and "shape (3, 2)" in repr(stack)


def test_frames_hold_every_metric_and_every_eigenvalue():
    result = result_of(["a", "b"])
    frame, values = result.to_dataframe(), result.to_dataframe("eigenvalues")
    assert list(frame["block"]) == ["a", "b", "block_diagonal", "full"] == list(values["block"].unique())
    for label, spectrum in result.matrices.items():
        own = values[values["block"] == label]
        assert own["eigenvalue"].tolist() == spectrum.eigenvalues.tolist()
        assert own["rank"].tolist() == list(range(1, len(spectrum.eigenvalues) + 1))
        assert own["resolved"].sum() == ff.metrics.numerical_rank(spectrum)
        assert frame.set_index("block").loc[label, "trace"] == ff.metrics.trace(spectrum).item()
    with pytest.raises(ValueError, match=r"expected of= one of \['metrics', 'eigenvalues'\], got of='rows'"):
        result.to_dataframe("rows")


def test_a_frame_of_a_comparison_has_a_row_per_result_block_and_metric():
    found = ff.compare({"x": result_of(["a", "b"]), "y": result_of(["a", "b"])}, across=["tokens"])
    frame = found.to_dataframe()
    assert len(frame) == 2 * 4 * len(ff.metrics.SUMMARY) and set(frame["result"]) == {"x", "y"}
    one = frame[(frame["result"] == "y") & (frame["block"] == "a") & (frame["metric"] == "trace")]
    assert one["value"].item() == found.values["a"]["trace"]["y"] and one["ratio"].item() == 1.0


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r'pip install "fisherfunc\[pandas\]"'):
        result_of(["a"]).to_dataframe()


def test_a_latex_table_has_a_row_per_matrix_and_no_bare_special_character():
    lines = result_of(["a_b%&", "c"]).to_latex().splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 1 + 4 and {len(re.split(r"(?<!\\)&", row)) for row in rows} == {7}
    assert rows[1].startswith(r"a\_b\%\& & 6 & 3 & ")
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\midrule", r"\bottomrule"]
    assert lines.index(r"\midrule", 4) == 6  # below the blocks


@pytest.mark.parametrize("value", [0.0, 1, 123456, 1.5e-12, math.nan, None])
def test_figures_are_short(value):
    assert len(figure(value)) <= 9
