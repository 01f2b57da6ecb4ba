"""The table of a result, for a terminal: one line a block, then the block-diagonal and the full matrix.

Below the table stand what the numbers mean (unit, normalisation, loss, resolution) and whatever made the
result other than plain and exact. The columns hold metrics of `fisherfunc.metrics.summary`.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fisherfunc.linalg.metrics import numerical_rank, summary
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.statistics.interval import Interval, Intervals
from fisherfunc.surface.sample_notes import interval_note, sample_notes
from fisherfunc.surface.wording import compact, count_of_units, matrix_name, model_name, notes, number

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
_FIGURES: dict[str, Any] = {"justify": "right", "vertical": "bottom", "overflow": "fold"}


def report(result: FisherSpectrum, *, width: int = 100) -> Any:
    """The table with its caption and notes, as something that a rich console prints.

    Args:
        result: What to show.
        width: The columns of the terminal; below 96, numbers have 3 digits in place of 4.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    table = _table(rich, result, wide=width >= WIDE)
    lines = [*caption(result), *notes(result.metadata)]
    return rich.console.Group(table, "", *(rich.text.Text(line, style="dim") for line in lines))


def caption(result: FisherSpectrum) -> list[str]:
    """What the numbers are, a line each: the matrix and its normalisation, the loss, and what is resolved."""
    facts = result.metadata
    unit, loss, mean = facts.get("unit", "token"), facts.get("loss"), facts.get("mean_loss")
    scale = facts.get("normalization", "F = (1/N) GᵀG")
    lines = [f"{_capital(matrix_name(facts))} per {unit}: {scale} ({count_of_units(facts)})"]
    if loss:
        lines.append(f"Loss: {loss}" + (f", mean {mean:.3f} nats a token" if mean is not None else ""))
    floor = _relative_resolution(result.full)
    if floor is not None:
        lines.append(f"Eigenvalues of the full matrix below {floor:.1e} λ_max are not resolved")
    if any(_unresolved(spectrum) for spectrum in (*result.blocks.values(), result.full)):
        lines.append("Condition numbers are of the resolved eigenvalues: lower bounds where others lie below")
    if result.coupling is not None and len(result.blocks) > 1:
        error = result.coupling.block_diagonal_error
        lines.append(
            f"The block-diagonal matrix leaves out {error:.1%} of the full one: ‖F − F_bd‖/‖F‖, Frobenius norms"
        )
    if result.intervals is not None:
        lines.append(interval_note(result.intervals.full["trace"]))
    return lines + sample_notes(result)


def _table(rich: ModuleType, result: FisherSpectrum, *, wide: bool) -> Any:
    table = rich.table.Table(
        title=_title(result.metadata),
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0),
        pad_edge=False,
    )
    table.add_column("block", overflow="fold", vertical="bottom")
    units = f"{result.metadata.get('unit', 'token')}s"
    for heading in (units, "parameters" if wide else "params", *(heading for heading, _ in COLUMNS)):
        table.add_column(heading if wide else heading.replace("condition", "cond."), **_FIGURES)
    intervals = result.intervals or Intervals(blocks={}, block_diagonal={}, full={})
    for label, spectrum in result.blocks.items():
        table.add_row(rich.text.Text(label), *_cells(spectrum, wide=wide))
        _add_ends(table, intervals.blocks.get(label), wide=wide)
    table.add_section()
    table.add_row("block-diagonal", *_cells(result.block_diagonal, wide=wide), style="bold")
    _add_ends(table, intervals.block_diagonal, wide=wide)
    table.add_row("full matrix", *_cells(result.full, wide=wide), style="bold")
    _add_ends(table, intervals.full, wide=wide)
    return table


def _add_ends(table: Any, intervals: Mapping[str, Interval] | None, *, wide: bool) -> None:
    """Two lines under a matrix: the lower and the upper ends of the intervals of its metrics."""
    if intervals:
        for end in ("low", "high"):
            cells = [_figure(getattr(intervals[key], end), key, wide=wide) for _, key in COLUMNS]
            table.add_row(f"  {end}", "", "", *cells, style="dim")


def _title(metadata: Mapping[str, Any]) -> str:
    model = model_name(metadata)
    return _capital(matrix_name(metadata)) + (f" of {model}" if model else "")


def _cells(spectrum: Spectrum, *, wide: bool) -> list[str]:
    values: dict[str, Any] = summary(spectrum)
    figures = [_figure(values[key], key, wide=wide) for _, key in COLUMNS]
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
        import rich.console
        import rich.table
        import rich.text
    except ImportError as error:
        raise ImportError(f'the report needs rich ({error}); install it with pip install "fisherfunc[cli]"') from error
    return rich
