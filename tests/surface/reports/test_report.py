"""The table: right numbers, honest names, no width that garbles it."""

import re
import sys

import pytest
import torch
from consoles import shown
from spectra import spectrum

from fisherfunc.linalg.metrics import summary
from fisherfunc.pipeline.solve import spectrum_of_gradients
from fisherfunc.surface.reports.report import report

WIDTHS = (80, 100, 160)
FIGURES = ("largest", "second", "gap", "condition_number", "effective_rank", "trace")


def _printed(result, width=100):
    return shown(report(result, width=width), width)


def _rows(text):
    return {
        line.split("  ")[0]: line.split("  ", 1)[1].split() for line in text.splitlines() if re.search(r"  +\d", line)
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_every_line_holds_the_metrics_of_its_block(width):
    result = spectrum(num_tokens=12, num_params=2000)
    rows = _rows(_printed(result, width))
    named = {**result.blocks, "block-diagonal": result.block_diagonal, "full matrix": result.full}
    assert list(rows) == list(named)
    for label, part in named.items():
        values = summary(part)
        tokens, params, *figures = rows[label]
        assert tokens == "12"
        assert int(params.replace(",", "")) == part.num_params
        for figure, key in zip(figures, FIGURES, strict=True):
            assert float(figure) == pytest.approx(values[key], rel=5e-3 if width == 80 else 5e-4, abs=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_too_long_and_no_number_cut(width):
    long = "transformer.h.11.attn.c_attn.weight"
    text = _printed(spectrum((long, "b"), num_params=123_456), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    joined = "".join(line.split("  ")[0] for line in text.splitlines())
    assert long in joined.replace(" ", "")
    numbers = re.findall(r" \d\.\d+e[+-]\d\d", text.split("Empirical Fisher per")[0])
    assert len(numbers) == 4 * 5  # four rows of five numbers, none of them wrapped


def test_headings_and_caption_say_what_is_shown():
    text = _printed(spectrum(), 160)
    for word in ("block", "tokens", "parameters", "λ_max", "λ_2", "gap", "condition", "eff.", "trace"):
        assert word in text.split("─")[0]
    assert "per token: F = (1/N) GᵀG, N = number of units (6 tokens)" in text
    assert "Loss: causal_lm, mean 3.250 nats a token" in text
    assert re.search(r"below \d\.\de-\d\d λ_max are not resolved", text)
    assert "tiny/model" in text


def test_fisher_never_stands_alone():
    assert not re.search(r"(?i)(?<!empirical )fisher", _printed(spectrum()))
    centred = _printed(spectrum(centered=True))
    assert "Gradient covariance" in centred
    assert "isher" not in centred


def test_what_does_not_exist_is_a_dash():
    rows = _rows(_printed(spectrum(scale=0.0)))
    assert all(row[2 + FIGURES.index("condition_number")] == "–" for row in rows.values())
    assert all(row[2] == "0" for row in rows.values())


def test_markup_in_a_label_is_not_interpreted():
    assert "[bold]x[/bold]" in _printed(spectrum(("[bold]x[/bold]", "b")))


NOTES = {
    "approximation: at most 10 coordinates a block": {"approximations": ["at most 10 coordinates a block"]},
    "solver fallback in layer.0: LinAlgError: no": {"fallback": {"layer.0": "LinAlgError: no"}},
    "3 token(s) with a non-finite loss or gradient were dropped": {"dropped_tokens": 3},
}


@pytest.mark.parametrize("note", NOTES)
def test_what_is_not_plain_and_exact_is_noted(note):
    assert note in _printed(spectrum(**NOTES[note]), 160)
    assert note not in _printed(spectrum(), 160)


def test_without_rich_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "fisherfunc\[cli\]"'):
        report(spectrum())


def test_condition_numbers_are_called_lower_bounds_only_where_eigenvalues_are_not_resolved():
    unresolved = spectrum_of_gradients({"a.weight": torch.tensor([[1.0, 0.0], [0.0, 1e-9]])})
    resolved = spectrum_of_gradients({"a.weight": torch.tensor([[1.0, 0.0], [0.0, 0.5]])})
    assert "lower bounds" in _printed(unresolved, 120) and "≥1.000" in _printed(unresolved, 120)
    assert "lower bounds" not in _printed(resolved, 120) and "≥" not in _printed(resolved, 120)


def test_a_covariance_of_one_unit_is_said_to_be_zero_by_construction():
    one = spectrum_of_gradients({"a.weight": torch.ones(1, 2)}, center=True)
    two = spectrum_of_gradients({"a.weight": torch.eye(2)}, center=True)
    assert "take more units" in _printed(one, 120)
    assert "take more units" not in _printed(two, 120)
