"""The table of the tokens that carry leading eigenvectors, for a terminal: each with the text around its target."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fisherfunc.gradients.directions import LeadingToken
from fisherfunc.surface.report import require_rich
from fisherfunc.surface.wording import count_of_units, matrix_name, model_name, number

BEFORE, AFTER = 30, 18
WHAT = "The share of a token in λ is the square of its coefficient ⟨g, v⟩/√(λN); all shares of a vector add up to 1"


def token_report(rows: Sequence[LeadingToken], facts: Mapping[str, Any]) -> Any:
    """The table with its caption, as something that a rich console prints.

    Args:
        rows: The tokens, by vector.
        facts: The metadata.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    name = model_name(facts)
    table = rich.table.Table(
        title=f"Leading tokens of the {matrix_name(facts)}" + (f" of {name}" if name else "") + f": {facts['block']}",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1),
        pad_edge=False,
    )
    for heading in ("λ", "share", "coeff.", "loss", "seq.", "pos."):
        table.add_column(heading, justify="right")
    table.add_column("target in its text", overflow="fold")
    for _, some in groupby(rows, key=lambda row: row.vector):
        for place, row in enumerate(some):
            table.add_row(number(row.eigenvalue) if place == 0 else "", *_cells(row), rich.text.Text(shown(row)))
        table.add_section()
    lines = [f"{count_of_units(facts)}; loss: {facts.get('loss')}", WHAT]
    return rich.console.Group(table, "", *(rich.text.Text(line, style="dim") for line in lines))


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
    return f"{before}«{row.text}»{after}".replace("\n", "⏎")


def _cells(row: LeadingToken) -> list[str]:
    return [f"{row.share:.3f}", f"{row.coefficient:+.3f}", f"{row.loss:.2f}", str(row.sequence), str(row.position)]
