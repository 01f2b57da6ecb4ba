"""The tables of a comparison, for a terminal: what the results are, then each metric, a row a block, a column a result.

Beside each number stands its ratio to the first result's.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from fisherfunc.pipeline.comparing.comparison import Comparison
from fisherfunc.population.estimate import Estimate
from fisherfunc.population.paired import LEVEL, METHOD
from fisherfunc.statistics.resampling.interval import Interval
from fisherfunc.surface.reports.report import require_rich
from fisherfunc.surface.reports.sample_notes import interval_notes, sample_notes
from fisherfunc.surface.reports.tables import Column, Row, in_groups, left_out_note, table
from fisherfunc.surface.visible import visible
from fisherfunc.surface.wording import NOTHING, matrix_name, model_name, notes, number

HEADINGS = {
    "largest": "λ_max, the largest eigenvalue",
    "second": "λ_2, the second eigenvalue",
    "smallest": "The smallest resolved eigenvalue",
    "gap": "Spectral gap λ_max − λ_2",
    "relative_gap": "Relative gap (λ_max − λ_2)/λ_max",
    "condition_number": "Condition number of the resolved eigenvalues",
    "trace": "Trace Σλ",
    "effective_rank": "Effective rank exp(H(λ/Σλ))",
    "stable_rank": "Stable rank Σλ/λ_max",
    "participation_ratio": "Participation ratio (Σλ)²/Σλ²",
    "numerical_rank": "Numerical rank: eigenvalues above the resolution",
}
PLAIN = ("relative_gap", "effective_rank", "stable_rank", "participation_ratio", "numerical_rank")
COLUMNS = (
    Column("result", figures=False),
    Column("model", rank=4, figures=False),
    Column("loss", rank=3, figures=False),
    Column("units", rank=1),
    Column("parameters", rank=5),
    Column("mean loss", rank=2),
    Column("off-diagonal", rank=6),
)
_BLOCK = Column("block", figures=False)
_OVERLAP = "Overlap of the leading subspaces"
POPULATION = {
    "participation_ratio": "Participation ratio (tr F)²/‖F‖² of the population",
    "block_diagonal_error": "‖F − F_bd‖/‖F‖ of the population: what the block-diagonal matrix leaves out",
    "effective_dimension": "Effective dimension Σλ/(λ + κ) of the population",
}
WHOLE = {"block_diagonal": "block-diagonal", "full": "full matrix"}


def compare_report(found: Comparison, *, metrics: Sequence[str], width: int = 120) -> Any:
    """The tables with a caption and notes, as something that a rich console prints.

    Args:
        found: What to show.
        metrics: Names in `fisherfunc.metrics`, in the order of their tables.
        width: The columns of the terminal; results that do not fit beside one another are below one another.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    facts, left_out = _facts(rich, found, width)
    tables: list[Any] = [facts]
    tables += [_metric(rich, found, metric, width) for metric in metrics]
    tables += [_population(rich, found, name, width) for name in POPULATION if _labels(found, name)]
    for heading, matrices in (("Centred kernel alignment of the token Grams", "similarity"), (_OVERLAP, "overlaps")):
        rows = found.to_dict()[matrices]
        tables += [_matrices(rich, found, heading, rows, width)] if rows else []
    spaced = [part for table in tables for part in (table, "")]
    lines = [*map(visible, caption(found, metrics)), *left_out_note(left_out, width)]
    return rich.console.Group(*spaced, *(rich.text.Text(line, style="dim") for line in lines))


def title(found: Comparison) -> str:
    """Which matrix, or matrices, the numbers are of."""
    kinds = dict.fromkeys(matrix_name(result.provenance) for result in found.results.values())
    text = " and ".join(kinds)
    return text[:1].upper() + text[1:]


def caption(found: Comparison, metrics: Sequence[str]) -> list[str]:
    """What the numbers are, and what made a result other than plain and exact, or is set by its sample."""
    facts = next(iter(found.results.values())).provenance
    lines = [f"{title(found)} per {facts.unit or 'token'}: {facts.normalization}"]
    lines.append(f"×: over the value of {found.names[0]!r}")
    if found.paired:
        lines.append(
            f"×low … ×high: {LEVEL:.0%} intervals of the ratio by {METHOD}: both err alike, on the same tokens"
        )
    if any(found.couplings.values()):
        lines.append("off-diagonal: what the block-diagonal matrix leaves out, ‖F − F_bd‖/‖F‖, Frobenius norms")
    lines += [f"Results differ in {aspect}: {_listed(values)}" for aspect, values in found.differing.items()]
    for name, result in found.results.items():
        remarks = notes(result.provenance)
        remarks += interval_notes(result.intervals, metrics) if result.intervals else []
        lines += [f"{name}: {remark}" for remark in remarks + sample_notes(result, metrics)]
    return lines


def shown(label: str) -> str:
    """What a row is called."""
    return WHOLE.get(label, label)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} ({name})" for name, value in values.items())


def _facts(rich: ModuleType, found: Comparison, width: int) -> tuple[Any, list[str]]:
    rows = []
    for name, result in found.results.items():
        facts = result.provenance
        mean, params = facts.mean_loss, facts.num_params
        words = (name, model_name(facts) or NOTHING, str(facts.loss or NOTHING))
        figures = (
            f"{facts.num_tokens:,} {facts.unit}s",
            NOTHING if params is None else f"{params:,}",
            NOTHING if mean is None else f"{mean:.3f}",
            NOTHING if result.coupling is None else f"{result.coupling.block_diagonal_error:.1%}",
        )
        rows.append(Row([*words, *figures]))
    drawn, left_out = table(rich, COLUMNS, rows, width=width)
    return _headed(rich, f"{title(found)} of {len(found.names)} results", [drawn]), left_out


def _metric(rich: ModuleType, found: Comparison, metric: str, width: int) -> Any:
    labels, rows = list(found.values), []
    for label in labels:
        style = "bold" if label in labels[-2:] else ""
        rows.append(Row([shown(label), *(_cell(found, label, metric, name) for name in found.names)], style=style))
        intervals = found.intervals[label][metric]
        if any(intervals.values()):
            rows.append(Row(["", *(_ends(intervals[name], metric) for name in found.names)], style="dim"))
        rows += _paired(found, label, metric) if metric == "trace" else []
        if label == labels[-3]:
            rows[-1] = rows[-1]._replace(ends_section=True)
    return _headed(rich, HEADINGS[metric], in_groups(rich, _BLOCK, _columns(found), rows, width=width))


def _population(rich: ModuleType, found: Comparison, name: str, width: int) -> Any:
    """An estimate of the population, with its ratios to the first result's."""
    rows = []
    for label in _labels(found, name):
        estimates = dict(zip(found.names, found.of_population(label, name), strict=True))
        cells = [_estimated(found, label, name, result, estimates[result]) for result in found.names]
        rows += [Row([shown(label), *cells], style="bold" if label == list(found.values)[-1] else "")]
        rows += _paired(found, label, name)
    heading = POPULATION[name]
    if name == "effective_dimension":
        heading += f" at κ = {found.kappa:.3g}, the least that all results resolve"
    return _headed(rich, heading, in_groups(rich, _BLOCK, _columns(found), rows, width=width))


def _labels(found: Comparison, name: str) -> list[str]:
    """Those of which the ratio of an estimate is known."""
    return [label for label, rows in found.paired.items() if any(rows.get(name, {}).values())]


def _estimated(found: Comparison, label: str, name: str, result: str, estimate: Estimate | None) -> str:
    text = NOTHING if estimate is None else number(estimate.estimate, scientific=False)
    ratio = found.paired[label][name][result]
    return text if result == found.names[0] else f"{text} {_times(None if ratio is None else ratio.estimate):>8}"


def _paired(found: Comparison, label: str, name: str) -> list[Row]:
    """A row of the paired intervals of ratios, where there are such."""
    row = found.paired.get(label, {}).get(name, {})
    found_of = (row.get(name) for name in found.names)
    held = [None if e is None or e.warning is not None else e for e in found_of]
    cells = ["" if e is None else f"{_times(e.low)} … {_times(e.high)}" for e in held]
    return [Row(["", *cells], style="dim")] if any(cells) else []


def _columns(found: Comparison) -> list[Column]:
    return [Column(visible(name)) for name in found.names]


def _cell(found: Comparison, label: str, metric: str, name: str) -> str:
    value, ratio = found.values[label][metric][name], found.ratios[label][metric][name]
    text = f"{value:,}" if isinstance(value, int) else number(value, scientific=metric not in PLAIN)
    if name == found.names[0]:
        return text
    return f"{text} {_times(ratio):>8}"


def _ends(interval: Interval | None, metric: str) -> str:
    """The ends of an interval, below the value; a dash where there is none, which a note explains."""
    if interval is None:
        return ""
    if not interval.known:
        return NOTHING
    low, high = (number(end, digits=3, scientific=metric not in PLAIN) for end in (interval.low, interval.high))
    return f"{low} … {high}"


def _times(ratio: float | None) -> str:
    """A ratio to three digits; nothing where there is none.

    Example:
        >>> _times(0.03907), _times(1.0), _times(18.92), _times(None)
        ('×0.0391', '×1.00', '×18.9', '')
    """
    return "" if ratio is None else f"×{ratio:#.3g}".rstrip(".")


def _matrices(rich: ModuleType, found: Comparison, heading: str, matrices: Mapping[str, Any], width: int) -> Any:
    """Their first rows: each result against the first."""
    rows = [
        Row([shown(label), *(NOTHING if v is None else f"{v:.3f}" for v in matrix[0])])
        for label, matrix in matrices.items()
    ]
    heading = f"{heading} with those of {visible(found.names[0])!r}"
    return _headed(rich, heading, in_groups(rich, _BLOCK, _columns(found), rows, width=width))


def _headed(rich: ModuleType, heading: str, tables: Sequence[Any]) -> Any:
    """Tables below a heading, which may be wider than they are."""
    return rich.console.Group(rich.text.Text(heading, style="italic"), *tables)
