"""The table of the tokens that carry leading eigenvectors, for a terminal: each with the text around its target."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fisherfunc.gradients.directions import LeadingToken
from fisherfunc.surface.report import require_rich
from fisherfunc.surface.tables import Column, Row, left_out_note, table
from fisherfunc.surface.visible import visible
from fisherfunc.surface.wording import count_of_units, matrix_name, model_name, number, windows

BEFORE, AFTER = 30, 18
COLUMNS = (
    Column("λ", rank=1),
    Column("share"),
    Column("coeff.", rank=5),
    Column("loss", rank=4),
    Column("seq.", rank=3),
    Column("pos.", rank=2),
    Column("target in its text", figures=False),
)
WHAT = "The share of a token in λ is the square of its coefficient ⟨g, v⟩/√(λN); all shares of a vector add up to 1"


def token_report(rows: Sequence[LeadingToken], facts: Mapping[str, Any], *, width: int = 120) -> Any:
    """The table with its caption, as something that a rich console prints.

    Args:
        rows: The tokens, by vector.
        facts: The metadata.
        width: The columns of the terminal; columns that do not fit are left out.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    name = model_name(facts)
    title = f"Leading tokens of the {matrix_name(facts)}" + (f" of {name}" if name else "") + f": {facts['block']}"
    lines = []
    for _, some in groupby(rows, key=lambda row: row.vector):
        of_vector = list(some)
        for place, row in enumerate(of_vector):
            first, last = place == 0, place == len(of_vector) - 1
            cells = [number(row.eigenvalue) if first else "", *_cells(row), shown(row)]
            lines.append(Row(cells, ends_section=last))
    drawn, left_out = table(rich, COLUMNS, lines, width=width, title=title)
    below = [
        f"{count_of_units(facts)}; loss: {facts.get('loss')}",
        *windows(facts),
        WHAT,
        *left_out_note(left_out, width),
    ]
    return rich.console.Group(drawn, "", *(rich.text.Text(line, style="dim") for line in below))


def shown(row: LeadingToken) -> str:
    """The text around a target, on one line, with the target in guillemets; its id where there is no text.

    Example:
        >>> shown(LeadingToken(vector=0, eigenvalue=1.0, row=0, sequence=0, position=0, coefficient=1.0, share=1.0,
        ...                    loss=0.5, target=7, before="peace and", text=" honest", after=" friend"))
        'peace and« honest» friend'
    """
    if row.text is None:
        return "–" if row.target is None else f"«{row.target}»"
    before, after = row.before or "", row.after or ""
    before = f"…{before[-BEFORE:]}" if len(before) > BEFORE else before
    after = f"{after[:AFTER]}…" if len(after) > AFTER else after
    return visible(f"{before}«{row.text}»{after}".replace("\n", "⏎"))


def _cells(row: LeadingToken) -> list[str]:
    return [f"{row.share:.3f}", f"{row.coefficient:+.3f}", f"{row.loss:.2f}", str(row.sequence), str(row.position)]
