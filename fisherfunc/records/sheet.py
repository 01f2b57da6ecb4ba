"""One screen of a record: a title, a table, some lines below, one small plot; as text, and as HTML for notebooks.

Pure: values in, a string out. Colours are those of the page, so that light and dark pages are served alike; the hues of
lines are those of Okabe and Ito, "Color universal design", 2008, which colour-blind readers tell apart.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

Number = int | float
NOTHING = "–"
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MOST_ROWS = 14
"""Of a table as text: with title, heading and notes that is a screen of 24 lines. Two thirds are the first rows."""
MOST_LETTERS = 32
MOST_POINTS = 64
"""Of a line: more are not seen in 300 pixels."""
_WIDE, _HIGH, _LEFT, _RIGHT, _BELOW = 420, 230, 52, 24, 34


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What one screen shows.

    Attributes:
        title: A line.
        columns: The headings; the first column is text, the others are figures.
        rows: The cells.
        notes: Lines below the table.
        lines: {label: values, largest first}, drawn against their rank; the last is drawn as the whole.
    """

    title: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    lines: Mapping[str, Sequence[float]] = field(default_factory=dict)


def figure(value: Number | None) -> str:
    """Write a number: an integer whole, any other to four digits or to ones, a dash where there is none.

    Example:
        >>> figure(504672), figure(53.1234), figure(14381.2), figure(None)
        ('504,672', '53.12', '14,381', '–')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def number_of(value: object) -> float | None:
    """Return the number in a tensor; None where there is not one that could be read, as under `vmap`."""
    if isinstance(value, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(value):
        return float(value) if value.numel() == 1 and not value.is_meta else None
    return float(value) if isinstance(value, int | float) else None


def as_text(sheet: Sheet) -> str:
    """Return at most a screen of text: a long table without its middle, long names cut."""
    lines = [_printable(sheet.title)]
    if sheet.rows:
        table = [list(sheet.columns), *([_short(row[0]), *row[1:]] for row in _without_middle(sheet.rows))]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for first, *others in table:
            cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines + [_printable(note) for note in sheet.notes])


def as_html(sheet: Sheet) -> str:
    """Return a part of a page: well-formed, without script, style sheet or request; long tables are folded."""
    parts = [f"<p><strong>{_escaped(sheet.title)}</strong></p>"]
    if sheet.rows:
        opened = ' open="open"' if len(sheet.rows) <= MOST_ROWS else ""
        summary = f"<summary>{len(sheet.rows)} rows</summary>"
        parts.append(f"<details{opened}>{summary}{table_html(sheet)}</details>")
    parts += [log_plot(sheet.lines)] if sheet.lines else []
    parts += [f'<p style="margin:0.2em 0;opacity:0.8">{_escaped(note)}</p>' for note in sheet.notes]
    return f'<div class="fisherfunc">{"".join(parts)}</div>'


def table_html(sheet: Sheet) -> str:
    """Return the table of a sheet; rows that have a line in the plot carry its colour."""
    colours = colours_of(list(sheet.lines))
    head = "".join(f'<th scope="col"{_align(i)}>{_escaped(name)}</th>' for i, name in enumerate(sheet.columns))
    body = []
    for row in sheet.rows:
        mark = f'<span style="color:{colours[row[0]]}">━ </span>' if row[0] in colours else ""
        cells = [f'<th scope="row"{_align(0)}>{mark}{_escaped(row[0])}</th>']
        cells += [f"<td{_align(1)}>{_escaped(cell)}</td>" for cell in row[1:]]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def colours_of(labels: Sequence[str]) -> dict[str, str]:
    """Return a colour per line: hues that can be told apart for a few, a ramp in their order for many."""
    last = len(labels) - 1
    few = last <= len(HUES)
    ramp = [HUES[i] if few else f"hsl({250 - 220 * i / max(1, last):.0f},70%,50%)" for i in range(max(0, last))]
    return dict(zip(labels, [*ramp, "currentColor"], strict=True)) if labels else {}


def log_plot(lines: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG of positive values against their rank, both logarithmic; of what has none, nothing."""
    kept = {
        label: [(rank, math.log10(value)) for rank, value in _thinned([v for v in values if v > 0])]
        for label, values in lines.items()
    }
    heights = [height for points in kept.values() for _, height in points]
    if not heights:
        return ""
    low = math.floor(min(heights))
    high = max(math.ceil(max(heights)), low + 1)
    return _plot(kept, {f"1e{power}": power for power in range(low, high + 1, math.ceil((high - low) / 5))}, "λ", high)


def share_plot(lines: Mapping[str, Sequence[float]]) -> str:
    """Return an SVG of the share that the first values have of their sum, against their number; of zeros, nothing."""
    kept = {}
    for label, values in lines.items():
        total = sum(values)
        kept[label] = _thinned([value / total for value in accumulate(values)]) if total > 0 else []
    if not any(kept.values()):
        return ""
    return _plot(kept, {f"{share}%": share / 100 for share in (0, 25, 50, 75, 100)}, "", 1)


def _plot(kept: Mapping[str, Sequence[tuple[int, float]]], marks: Mapping[str, Number], name: str, high: Number) -> str:
    """Lines of (rank, height), ranks on a logarithmic axis; marks are {text: height}, the lowest at the bottom."""
    low = min(marks.values())
    right = math.log10(max(rank for points in kept.values() for rank, _ in points)) or 1.0

    def place(rank: Number, height: Number) -> tuple[float, float]:
        across = _LEFT + (_WIDE - _LEFT - _RIGHT) * math.log10(rank) / right
        return across, 8 + (_HIGH - _BELOW - 8) * (high - height) / (high - low)

    colours, drawn = colours_of(list(kept)), []
    for label, points in kept.items():
        if not points:
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        look = f'fill="none" stroke="{colours[label]}" stroke-width="{2 if colours[label] == "currentColor" else 1.4}"'
        ends = 'stroke-linecap="round" stroke-linejoin="round"'
        path += " " + path.split(" ")[-1]  # twice, so that a single point is seen
        drawn.append(f'<polyline points="{path}" {look} {ends}><title>{_escaped(label)}</title></polyline>')
    ticks = []
    for text, height in marks.items():
        y = place(1, height)[1]
        ticks.append(_line(_LEFT, y, _WIDE - _RIGHT, y) + _words(_LEFT - 5, y + 4, text, "end"))
    for power in range(math.floor(right) + 1):
        ticks.append(_words(place(10**power, low)[0], _HIGH - _BELOW + 16, f"{10**power:,}", "middle"))
    title = _words((_WIDE - _RIGHT + _LEFT) / 2, _HIGH - 4, "rank", "middle") + _words(4, 12, name, "start")
    return (
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{name or "share of the sum"} against rank" '
        f'style="width:100%;max-width:{_WIDE}px;height:auto" xmlns="http://www.w3.org/2000/svg" '
        f'font-size="11" fill="currentColor">{"".join(ticks)}{title}{"".join(drawn)}</svg>'
    )


def _thinned(values: Sequence[float]) -> list[tuple[int, float]]:
    """(rank, value) at ranks that are evenly spread on a logarithmic axis, the first and the last among them."""
    if len(values) <= MOST_POINTS:
        return list(enumerate(values, start=1))
    exponents = (math.log(len(values)) * i / (MOST_POINTS - 1) for i in range(MOST_POINTS))
    ranks = sorted({round(math.exp(exponent)) for exponent in exponents})
    return [(rank, values[rank - 1]) for rank in ranks]


def _without_middle(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    if len(rows) <= MOST_ROWS:
        return list(rows)
    first = 2 * MOST_ROWS // 3
    last = MOST_ROWS - first - 1
    gap = [f"… {len(rows) - first - last} more", *([""] * (len(rows[0]) - 1))]
    return [*rows[:first], gap, *rows[-last:]]


def _short(name: str) -> str:
    name = _printable(name)
    half = MOST_LETTERS // 2
    return name if len(name) <= MOST_LETTERS else f"{name[: half - 1]}…{name[-half:]}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)


def _escaped(text: str) -> str:
    return html.escape(_printable(text))


def _align(column: int) -> str:
    return f' style="text-align:{"right" if column else "left"};font-variant-numeric:tabular-nums"'


def _line(*ends: Number) -> str:
    names = zip(("x1", "y1", "x2", "y2"), ends, strict=True)
    where = " ".join(f'{name}="{end:.1f}"' for name, end in names)
    return f'<line {where} stroke="currentColor" stroke-opacity="0.15"/>'


def _words(x: Number, y: Number, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
