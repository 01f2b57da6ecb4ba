"""Tables that fit a terminal: text is folded, columns are left out, and no number is ever cut or broken over two lines.

Every column of figures is as wide as its widest cell, or where its cells may be broken, as its widest word. Where not
all fit, those of the highest rank go first.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from fisherfunc.surface.visible import visible

LEAST_TEXT = 14
"""To how many places text is folded before a column is left out: "block-diagonal" has as many."""
_HARDLY_TEXT = 5  # where no other column is left to go
_GAP = 3  # a space on either side of where a rule would be


class Column(NamedTuple):
    """A column.

    Attributes:
        heading: What stands above its cells.
        rank: When it is left out: high ranks first, 0 never.
        figures: Whether its cells are figures, or text that may be folded anywhere.
        breaks: Whether its figures may go on on the next line after a space, as an interval may.
    """

    heading: str
    rank: int = 0
    figures: bool = True
    breaks: bool = False


class Row(NamedTuple):
    """The cells of a row, how they look, and whether a rule follows."""

    cells: Sequence[str]
    style: str = ""
    ends_section: bool = False


def table(
    rich: ModuleType, columns: Sequence[Column], rows: Sequence[Row], *, width: int, title: str = "", gap: int = _GAP
) -> tuple[Any, list[str]]:
    """Return a table that is at most so wide, and the headings of the columns that it has no room for.

    Args:
        rich: As of `require_rich`.
        columns: Of the whole table.
        rows: Each with a cell a column.
        width: The columns of the terminal.
        title: A line above.
        gap: The places between two columns, 1 or 3.
    """
    rows = [row._replace(cells=[visible(cell) for cell in row.cells]) for row in rows]
    shown = list(range(len(columns)))
    widest = [_widest(rich, columns, rows, index) for index in shown]
    least = [_narrowest(rich, columns, rows, index, widest[index]) for index in shown]
    while _taken(least, shown, gap) > width and any(columns[index].rank for index in shown):
        shown.remove(max(shown, key=lambda index: columns[index].rank))
    widths = _widths(columns, widest, least, shown, width - gap * (len(shown) - 1))
    drawn = rich.table.Table(
        title=rich.text.Text(visible(title), style="table.title") if title else None,
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, gap // 2),
        pad_edge=False,
    )
    for index in shown:
        heading = rich.text.Text(columns[index].heading, overflow="fold")
        justify = "right" if columns[index].figures else "left"
        drawn.add_column(heading, justify=justify, vertical="bottom", width=widths[index])
    for row in rows:
        cells = [
            rich.text.Text(row.cells[i], overflow="fold", no_wrap=columns[i].figures and not columns[i].breaks)
            for i in shown
        ]
        drawn.add_row(*cells, style=row.style, end_section=row.ends_section)
    return drawn, [column.heading.replace("\n", " ") for i, column in enumerate(columns) if i not in shown]


def left_out_note(headings: Sequence[str], width: int) -> list[str]:
    """Return the line under a table that names the columns left out, if there are any."""
    return [f"Not shown in {width} columns: {', '.join(headings)}; --format json has them"] if headings else []


def in_groups(
    rich: ModuleType, first: Column, columns: Sequence[Column], rows: Sequence[Row], *, width: int
) -> list[Any]:
    """Return tables of some columns each that are at most so wide, all of which begin with the same column.

    Args:
        rich: As of `require_rich`.
        first: The column of text that each table begins with.
        columns: The others, of figures, of which none may be left out; long headings are folded.
        rows: Each with a cell for the first column, then one a column.
        width: The columns of the terminal.
    """
    everything = [first, *columns]
    least = [
        _narrowest(rich, everything, rows, index, _widest(rich, everything, rows, index))
        for index in range(len(everything))
    ]
    groups: list[list[int]] = [[]]
    for index in range(1, len(everything)):
        fits = _taken(least, [0, *groups[-1], index], _GAP) <= width
        groups.append([index]) if groups[-1] and not fits else groups[-1].append(index)
    return [
        table(
            rich,
            [everything[index] for index in (0, *group)],
            [row._replace(cells=[row.cells[index] for index in (0, *group)]) for row in rows],
            width=width,
        )[0]
        for group in groups
    ]


def _widest(rich: ModuleType, columns: Sequence[Column], rows: Sequence[Row], index: int) -> int:
    """Of the cells; long headings of figures are folded to the least width of text."""
    cells = max((rich.cells.cell_len(row.cells[index]) for row in rows), default=1)
    heading = max(map(rich.cells.cell_len, columns[index].heading.split("\n")))
    return max(cells, min(heading, LEAST_TEXT) if columns[index].figures else heading, 1)


def _narrowest(rich: ModuleType, columns: Sequence[Column], rows: Sequence[Row], index: int, widest: int) -> int:
    """The least width before a column is left out: of text some places, of broken figures their widest word."""
    if not columns[index].figures:
        return min(widest, LEAST_TEXT)
    if not columns[index].breaks:
        return widest
    words = " ".join([columns[index].heading, *(row.cells[index] for row in rows)]).split()
    return max(map(rich.cells.cell_len, words))


def _taken(widths: Sequence[int], shown: Sequence[int], gap: int) -> int:
    return sum(widths[index] for index in shown) + gap * (len(shown) - 1)


def _widths(
    columns: Sequence[Column], widest: Sequence[int], least: Sequence[int], shown: Sequence[int], room: int
) -> dict[int, int]:
    """Text is folded, the widest first; then figures are broken where they may be; then text is folded further."""
    widths = {index: widest[index] for index in shown}
    texts = {index: least[index] for index in shown if not columns[index].figures}
    broken = {index: least[index] for index in shown if columns[index].breaks}
    for limits in (texts, broken, dict.fromkeys(texts, _HARDLY_TEXT)):
        while sum(widths.values()) > room:
            wide = [index for index, limit in limits.items() if widths[index] > limit]
            if not wide:
                break
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths
