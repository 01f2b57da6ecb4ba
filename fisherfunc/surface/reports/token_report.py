"""The table of the tokens that carry leading eigenvectors, for a terminal: each with the text around its target."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from fisherfunc.gradients.directions import LeadingToken
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.reports.report import require_rich
from fisherfunc.surface.reports.tables import Column, Row, left_out_note, table
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
ONE_TOKEN = 0.5
"""The share of a token in λ beyond which its gradient is closer to the direction than all others together."""
HELD = "What is held: of λ, by this direction of all other sequences, of a sequence that it was made without"
WHAT = "The share of a token in λ is the square of its coefficient ⟨g, v⟩/√(λN); all shares of a vector add up to 1"


def token_report(rows: Sequence[LeadingToken], facts: Provenance, found: Mapping[str, Any], *, width: int = 120) -> Any:
    """The table with its caption, as something that a rich console prints.

    Args:
        rows: The tokens, by vector.
        facts: The provenance.
        found: `eigenvalues`, those `out_of_sample`, and the `block`.
        width: The columns of the terminal; columns that do not fit are left out.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    name = model_name(facts)
    title = f"Leading tokens of the {matrix_name(facts)}" + (f" of {name}" if name else "") + f": {found['block']}"
    lines = []
    for _, some in groupby(rows, key=lambda row: row.vector):
        of_vector = list(some)
        for place, row in enumerate(of_vector):
            first, last = place == 0, place == len(of_vector) - 1
            cells = [number(row.eigenvalue) if first else "", *_cells(row), shown(row)]
            lines.append(Row(cells, ends_section=last))
    drawn, left_out = table(rich, COLUMNS, lines, width=width, title=title)
    below = [
        f"{count_of_units(facts)}; loss: {facts.loss}",
        *windows(facts),
        WHAT,
        *beyond_sample(rows, found),
        *left_out_note(left_out, width),
    ]
    return rich.console.Group(drawn, "", *(rich.text.Text(line, style="dim") for line in below))


def beyond_sample(rows: Sequence[LeadingToken], found: Mapping[str, Any]) -> list[str]:
    """Say of each direction how many tokens it is, and whether it exists beyond the sample, a line each.

    Example:
        >>> row = LeadingToken(vector=0, eigenvalue=50.0, row=0, sequence=0, position=0, coefficient=0.99, share=0.98,
        ...                    loss=0.5)
        >>> beyond_sample([row], {"eigenvalues": [50.0], "out_of_sample": [0.25]})[0]
        'λ 5.000e+01: this direction is one token; of other sequences it holds 0.5 %'
    """
    outside = found["out_of_sample"]
    if outside is None:
        return []
    lines = []
    for k, (value, other) in enumerate(zip(found["eigenvalues"], outside, strict=True)):
        shares = [row.share for row in rows if row.vector == k]
        most = max(shares, default=0.0)
        is_one = "this direction is one token" if most > ONE_TOKEN else f"no token has more than {most:.0%} of it"
        lines.append(f"λ {number(value)}: {is_one}; of other sequences it holds {100 * other / value:.2g} %")
    return [*lines, HELD]


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
