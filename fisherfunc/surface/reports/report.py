"""The tables of a result, for a terminal: what holds of the population, and what is of the sample alone.

The first is what may be quoted without its N, where it is known; the second has one line a block, then the
block-diagonal and the full matrix, and its columns hold metrics of `fisherfunc.metrics.summary`. Below stand what the
numbers mean (unit, normalisation, loss, resolution) and whatever made the result other than plain and exact.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fisherfunc.linalg.metrics import numerical_rank, summary
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.solve import NORMALIZATION
from fisherfunc.records.provenance import Provenance
from fisherfunc.statistics.resampling.interval import Interval, Intervals
from fisherfunc.surface.reports.population_notes import population_notes, population_tables, sample_heading
from fisherfunc.surface.reports.sample_notes import interval_notes, sample_notes
from fisherfunc.surface.reports.tables import Column, Row, left_out_note, table
from fisherfunc.surface.visible import visible
from fisherfunc.surface.wording import compact, count_of_units, matrix_name, model_name, notes, number, windows

WIDE = 96
COLUMNS = (
    ("λ_max", "largest"),
    ("λ_2", "second"),
    ("gap", "gap"),
    ("condition\nnumber", "condition_number"),
    ("eff.\nrank", "effective_rank"),
    ("trace", "trace"),
)
PLAIN = ("effective_rank",)
LEFT_OUT = ("gap", "second", "parameters", "condition_number", "tokens", "effective_rank", "trace")
"""In a narrow terminal, in this order."""


def report(result: FisherSpectrum, *, width: int = 100) -> Any:
    """The tables with their caption and notes, as something that a rich console prints.

    Args:
        result: What to show.
        width: The columns of the terminal; below 96, numbers have 3 digits in place of 4, and below what they need
            columns are left out.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    of_population, without = population_tables(rich, result, width)
    drawn, left_out = _table(rich, result, width)
    left_out = list(dict.fromkeys(without + left_out))  # the parameters stand in two tables
    lines = map(visible, [*caption(result), *notes(result.provenance), *left_out_note(left_out, width)])
    if of_population:
        of_population.insert(0, rich.text.Text(f"{visible(_title(result.provenance))}\n", style="bold"))
    return rich.console.Group(*of_population, drawn, "", *(rich.text.Text(line, style="dim") for line in lines))


def caption(result: FisherSpectrum) -> list[str]:
    """What the numbers are, a line each: the matrix and its normalisation, the loss, and what is resolved."""
    facts = result.provenance
    unit, loss, mean = facts.unit or "token", facts.loss, facts.mean_loss
    scale = facts.normalization or NORMALIZATION
    lines = [f"{_capital(matrix_name(facts))} per {unit}: {scale} ({count_of_units(facts)})"]
    if loss:
        lines.append(f"Loss: {loss}" + (f", mean {mean:.3f} nats a token" if mean is not None else ""))
    lines += windows(facts)
    floor = _relative_resolution(result.full)
    if floor is not None:
        lines.append(f"Eigenvalues of the full matrix below {floor:.1e} λ_max are not resolved")
    if any(_unresolved(spectrum) for spectrum in (*result.blocks.values(), result.full)):
        lines.append("Condition numbers with ≥ are lower bounds: the smallest eigenvalues are below the resolution")
    if result.coupling is not None and len(result.blocks) > 1 and result.population is None:
        error = result.coupling.block_diagonal_error
        left_out = f"The block-diagonal matrix leaves out {error:.1%} of the full one of these {unit}s"
        lines.append(f"{left_out}: ‖F − F_bd‖/‖F‖, Frobenius norms")
    if result.intervals is not None:
        lines += interval_notes(result.intervals, [key for _, key in COLUMNS])
    return lines + sample_notes(result) + population_notes(result)


def _table(rich: ModuleType, result: FisherSpectrum, width: int) -> tuple[Any, list[str]]:
    wide = width >= WIDE
    units = f"{result.provenance.unit or 'token'}s"
    headings = ((units, "tokens"), ("parameters" if wide else "params", "parameters"), *COLUMNS)
    columns = [
        Column(heading if wide else heading.replace("condition", "cond."), rank=_rank(key)) for heading, key in headings
    ]
    intervals = result.intervals or Intervals(blocks={}, block_diagonal={}, full={})
    rows = []
    for label, spectrum in result.blocks.items():
        rows.append(Row([label, *_cells(spectrum, wide=wide)]))
        rows += _ends(intervals.blocks.get(label), wide=wide)
    rows[-1] = rows[-1]._replace(ends_section=True)
    for label, spectrum, ends in (
        ("block-diagonal", result.block_diagonal, intervals.block_diagonal),
        ("full matrix", result.full, intervals.full),
    ):
        rows.append(Row([label, *_cells(spectrum, wide=wide)], style="bold"))
        rows += _ends(ends, wide=wide)
    block = Column("block", figures=False)
    title = _title(result.provenance) if result.population is None else sample_heading(result)
    return table(rich, [block, *columns], rows, width=width, title=title, gap=1)


def _rank(key: str) -> int:
    return len(LEFT_OUT) - LEFT_OUT.index(key) if key in LEFT_OUT else 0


def _ends(intervals: Mapping[str, Interval] | None, *, wide: bool) -> list[Row]:
    """Two rows under a matrix: the lower and the upper ends of the intervals of its metrics, where there are such."""
    known = {key: interval for key, interval in (intervals or {}).items() if interval.known}
    return [
        Row(
            [
                f"  {end}",
                "",
                "",
                *(_figure(getattr(known.get(key), end, None), key, wide=wide) for _, key in COLUMNS),
            ],
            style="dim",
        )
        for end in ("low", "high")
        if intervals
    ]


def _title(provenance: Provenance) -> str:
    model = model_name(provenance)
    return _capital(matrix_name(provenance)) + (f" of {model}" if model else "")


def _cells(spectrum: Spectrum, *, wide: bool) -> list[str]:
    values: dict[str, Any] = summary(spectrum)
    figures = [_figure(values[key], key, wide=wide) for _, key in COLUMNS]
    if values["condition_number"] is not None and _unresolved(spectrum):
        place = [key for _, key in COLUMNS].index("condition_number")
        figures[place] = f"≥{figures[place]}"
    params = values["num_params"]
    return [str(values["num_tokens"]), f"{params:,}" if wide and params else compact(params), *figures]


def _figure(value: float | None, key: str, *, wide: bool) -> str:
    return number(value, digits=4 if wide else 3, scientific=key not in PLAIN)


def _relative_resolution(spectrum: Spectrum) -> float | None:
    largest = spectrum.eigenvalues.amax().item()
    return spectrum.resolution.item() / largest if largest > 0 else None


def _unresolved(spectrum: Spectrum) -> bool:
    return int(numerical_rank(spectrum)) < spectrum.eigenvalues.shape[-1]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def require_rich() -> ModuleType:
    """Import rich, with the modules that tables need.

    Raises:
        ImportError: If it is not installed; it says how to.
    """
    try:
        import rich.box
        import rich.cells
        import rich.console
        import rich.table
        import rich.text
    except ImportError as error:
        raise ImportError(f'the report needs rich ({error}); install it with pip install "fisherfunc[cli]"') from error
    return rich
