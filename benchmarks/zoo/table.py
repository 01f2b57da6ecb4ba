"""The rows of the sweep as Markdown: counts by kind and verdict, then every row."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.zoo.judge import KINDS, VERDICTS, Row


def summary(rows: Sequence[Row]) -> str:
    """A line a kind, a column a verdict."""
    counts = Counter((row.kind, row.verdict) for row in rows)
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    lines = [f"| kind | models | {' | '.join(VERDICTS)} |", f"| --- | ---: |{' ---: |' * len(VERDICTS)}"]
    for kind in kinds:
        numbers = [counts[kind, verdict] for verdict in VERDICTS]
        lines.append(f"| {kind} | {sum(numbers)} | {' | '.join(map(str, numbers))} |")
    totals = [sum(counts[kind, verdict] for kind in kinds) for verdict in VERDICTS]
    return "\n".join([*lines, f"| all | {sum(totals)} | {' | '.join(map(str, totals))} |"])


def markdown(rows: Sequence[Row]) -> str:
    """Everything: the summary and a table a kind."""
    parts = ["# Public models against the float64 loop", summary(rows)]
    for kind in KINDS:
        own = sorted((row for row in rows if row.kind == kind), key=lambda row: row.name)
        if own:
            columns = ("name", "model", "parameters", "tokens", "dtype inside", "route", "error", "tolerance")
            header = f"| {' | '.join((*columns, 'verdict', 'reason'))} |"
            ruler = "| --- | --- | ---: | ---: | --- | --- | ---: | ---: | --- | --- |"
            parts.append("\n".join([f"## {kind}\n", header, ruler, *map(_line, own)]))
    return "\n\n".join(parts) + "\n"


def _line(row: Row) -> str:
    error = "" if row.error is None else f"{row.error:.0e}"
    tolerance = "" if row.tolerance is None else f"{row.tolerance:.0e}"
    numbers = [f"{row.parameters:,}" if row.parameters else "", str(row.tokens or "")]
    cells = [row.name, row.model, *numbers, row.dtype, row.route, error, tolerance, row.verdict, row.reason]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
