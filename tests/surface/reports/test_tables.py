"""Tables in terminals of any width: no line is longer, and no number is cut or broken over two lines."""

import io
import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fisherfunc.gradients.directions import LeadingToken
from fisherfunc.pipeline.comparing.compare import compare
from fisherfunc.pipeline.sheets import told
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.reports.compare_report import compare_report
from fisherfunc.surface.reports.plan_report import plan_report
from fisherfunc.surface.reports.report import report, require_rich
from fisherfunc.surface.reports.tables import Column, Row, table
from fisherfunc.surface.reports.token_report import token_report

NARROWEST = 30
NUMBER = re.compile(r"[-+×]?\d+(?:\.\d+)?(?:e[-+]\d+)?%?")


@cache
def result(seed=0):
    import torch
    from torch import nn

    import fisherfunc as ff

    torch.manual_seed(0)
    batch = (torch.randn(9, 4), torch.randint(3, (9,)))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))
    found = ff.fisher_spectrum(model, batch, blocks=ff.by_parameter, intervals="jackknife")
    return found, ff.plan(model, batch)


def drawn(renderable, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue().splitlines()


def numbers(lines):
    return {number for line in lines for number in NUMBER.findall(line)}


FULL = {"block": "full matrix", "out_of_sample": None}

TOKENS = [
    LeadingToken(
        vector=place // 2, eigenvalue=1.5e-7, row=1, sequence=12, position=place, coefficient=-0.123, share=0.5,
        loss=9.75, target=7, before="before the ", text=" whale", after=" and after it",
    )
    for place in range(4)
]  # fmt: skip
REPORTS = {
    "spectrum": lambda width: report(result()[0], width=width),
    "comparison": lambda width: compare_report(
        compare({f"run-{seed}": result(seed)[0] for seed in range(5)}), metrics=["largest", "trace"], width=width
    ),
    "plan": lambda width: plan_report(result()[1], Provenance(unit="token"), width=width),
    "tokens": lambda width: token_report(TOKENS, Provenance(num_tokens=4), FULL, width=width),
}


@pytest.mark.parametrize("kind", REPORTS)
@pytest.mark.parametrize("width", [NARROWEST, 40, 60, 80, 120])
def test_no_number_is_cut(kind, width):
    """Every number of a narrow table stands in the one that has room for all, of as many digits."""
    lines = [line for line in drawn(REPORTS[kind](width), width) if "─" not in line]
    whole = numbers(drawn(REPORTS[kind](95 if width < 96 else 250), 250)) | {str(width)}
    assert max(map(len, lines)) <= width
    assert numbers(lines) <= whole
    assert len([number for number in numbers(lines) if "." in number]) > (kind == "spectrum")


@pytest.mark.parametrize("width", [NARROWEST, 40, 60, 80])
def test_intervals_of_the_population_are_broken_at_spaces_alone(width):
    found = result()[0]
    words = {word for line in drawn(report(found, width=width), width) for word in line.split()}
    population = found.population
    for estimate in (population.trace.full, population.participation_ratio.full, *population.trace.values()):
        assert {*told(estimate).split()} <= words


@given(
    cells=st.lists(
        st.lists(st.text("0123456789", min_size=1, max_size=9), min_size=4, max_size=4), min_size=1, max_size=4
    ),
    width=st.integers(NARROWEST, 80),
)
def test_columns_that_have_no_room_are_left_out_by_rank(cells, width):
    columns = [Column("a name", figures=False), Column("first"), *(Column(f"{rank}", rank=rank) for rank in (1, 2))]
    found, left_out = table(require_rich(), columns, [Row(row) for row in cells], width=width)
    text = drawn(found, width)
    assert max(map(len, text)) <= width
    assert left_out in ([], ["2"], ["1", "2"])
    shown = [index for index, column in enumerate(columns) if column.heading not in left_out]
    rows = [line.split() for line in text[2:]]
    for row in cells:
        assert [row[index] for index in shown] in rows


def test_what_is_left_out_is_said():
    lines = drawn(REPORTS["spectrum"](60), 60)
    assert "Not shown in 60 columns: " in " ".join(lines) and "gap" in " ".join(lines).split("Not shown")[1]
    assert "gap" not in lines[1] + lines[2]
    assert "Not shown" not in " ".join(drawn(REPORTS["spectrum"](120), 120))
