"""The picture of a comparison: a panel a block with the spectra of all results, panels of numbers along the results.

Spectra are solid down to their own resolution and faint below it. All panels of spectra have the same axes. Numbers are
those of the tokens, and below them, where they are known, those of the population. Bands are intervals.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.comparing.comparison import Comparison
from fisherfunc.population.estimate import Estimate
from fisherfunc.statistics.resampling.interval import Interval
from fisherfunc.surface.plots.axis import axis_name, varying_number
from fisherfunc.surface.plots.plot_style import INK, require_matplotlib, shortened, styled
from fisherfunc.surface.plots.plots import LEGEND_LIMIT, colorbar, line, palette_of
from fisherfunc.surface.reports.compare_report import PLAIN, shown, title
from fisherfunc.surface.wording import count_of_units, model_name

PANELS = 12
"""The most panels of spectra: more blocks than fit show those of the largest trace."""
_COLUMNS = 4
_WIDTH, _HEAD, _PANEL, _METRIC = 9.6, 0.55, 2.0, 2.7
_IN_NATS = ("causal_lm", "masked_lm", "seq2seq_lm", "classification")
_SQUARED = ("largest", "second", "smallest", "gap", "trace")
_LABELS = {
    "largest": r"largest eigenvalue $\lambda_1$",
    "second": r"second eigenvalue $\lambda_2$",
    "smallest": "smallest resolved eigenvalue",
    "gap": r"gap $\lambda_1-\lambda_2$",
    "relative_gap": r"relative gap $(\lambda_1-\lambda_2)/\lambda_1$",
    "condition_number": "condition number",
    "trace": r"trace $\Sigma\lambda$",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "participation_ratio": "participation ratio",
    "numerical_rank": "numerical rank",
}


_OF_POPULATION = {
    "participation_ratio": "participation ratio",
    "block_diagonal_error": r"left out $\|F-F_{bd}\|/\|F\|$",
    "leading_eigenvalue": r"largest eigenvalue $\lambda_1$",
    "effective_dimension": "eff. dimension",
}
"""Estimates in `PopulationSummary`, a panel each."""


def plot_comparison(found: Comparison, *, metrics: Sequence[str]) -> Any:
    """The spectra of all results, block by block, above their metrics and what holds of the population, as a `Figure`.

    Args:
        found: What to draw.
        metrics: Names in `fisherfunc.metrics`, a panel each.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    labels = _panels(found)
    rows, rows_below = -(-(len(labels) + 1) // _COLUMNS), -(-len(metrics) // 3)
    estimates = [name for name in _OF_POPULATION if _points(found, name)]
    heights = [_HEAD, _PANEL * rows, _METRIC * rows_below, *([_METRIC] if estimates else [])]
    with styled(matplotlib):
        figure = matplotlib.figure.Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        head, above, below, *last = figure.subfigures(len(heights), 1, height_ratios=heights)
        _titles(head, found)
        _spectra(matplotlib, above, found, labels, rows)
        _metrics(matplotlib, below, found, metrics, rows_below)
        for part in last:
            below.suptitle("Of these tokens", x=0.012, ha="left", fontsize=9.5, weight="bold")
            _population(matplotlib, part, found, estimates)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is settled: every save gives the same picture
    return figure


def _panels(found: Comparison) -> list[str]:
    """The blocks that have a panel, in order, and the full matrix."""
    *blocks, _, full = found.values
    if len(blocks) == 1:
        return blocks
    trace = {label: max(v or 0.0 for v in found.values[label]["trace"].values()) for label in blocks}
    kept = set(sorted(blocks, key=lambda label: trace[label], reverse=True)[: PANELS - 2])
    return [*(label for label in blocks if label in kept), full]


def _titles(figure: Any, found: Comparison) -> None:
    facts = [result.provenance for result in found.results.values()]
    parts = list(dict.fromkeys(text for f in facts for text in (count_of_units(f), f.loss or "")))
    models = shortened(", ".join(dict.fromkeys(name for f in facts if (name := model_name(f)))), 110)
    heading = title(found)
    figure.text(0.012, 0.95, f"Spectra of the {heading[:1].lower()}{heading[1:]}", weight="bold", size=12.5, va="top")
    facts_line = "  ·  ".join(filter(None, [models, *parts]))
    figure.text(0.012, 0.42, facts_line, size=8.5, color="#5f5f5f", va="top")


def _spectra(matplotlib: ModuleType, figure: Any, found: Comparison, labels: Sequence[str], rows: int) -> None:
    grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    colors = _colors(matplotlib, len(found.names))
    for axes, label in zip(grid, labels, strict=False):
        for index, result in enumerate(found.results.values()):
            spectrum = result.blocks.get(label, result.full if label == list(found.values)[-1] else None)
            if spectrum is not None:
                line(axes, spectrum, label=found.names[index], color=colors(index), linewidth=1.5)
        axes.set(xscale="log", yscale="log")
        axes.set_title(shortened(shown(label), 30), fontsize=9.5, pad=3)
        axes.xaxis.set_major_formatter(lambda rank, _: f"{rank:,.0f}")
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    _limits(grid[0], found)
    for axes in grid[len(labels) :]:
        axes.set_axis_off()
    for position, axes in enumerate(grid[: len(labels)]):
        if position % _COLUMNS == 0:
            axes.set_ylabel(rf"eigenvalue $\lambda_k${_unit(found)}")
        if position + _COLUMNS >= len(labels):
            axes.set_xlabel("rank $k$")
            axes.tick_params(labelbottom=True)
    handles, names = grid[0].get_legend_handles_labels()
    grid[-1].legend(handles, [shortened(name) for name in names], loc="center", fontsize=9.5, title="result")


def _limits(axes: Any, found: Comparison) -> None:
    """From half a decade above the largest eigenvalue to half a decade below the smallest that is resolved."""
    spectra = [s for result in found.results.values() for s in (*result.blocks.values(), result.full)]
    positive = [s for s in spectra if s.eigenvalues[0] > 0]
    if not positive:
        axes.text(0.5, 0.5, "all eigenvalues are zero", transform=axes.transAxes, ha="center", va="center", fontsize=8)
        axes.set(xlim=(0.85, 10), ylim=(0.1, 10))
        return
    bottom = min(_smallest_resolved(s) for s in positive)
    longest = max(len(s.eigenvalues) for s in positive)
    top = max(s.eigenvalues[0].item() for s in positive)
    axes.set(xlim=(0.85, max(longest, 2) * 1.18), ylim=(bottom / 3, top * 3))


def _smallest_resolved(spectrum: Spectrum) -> float:
    """The smallest eigenvalue that is resolved; the largest where none is, as may be in bfloat16."""
    resolved = spectrum.eigenvalues[spectrum.eigenvalues > spectrum.resolution]
    return float((resolved if len(resolved) else spectrum.eigenvalues[:1]).min())


def _metrics(matplotlib: ModuleType, figure: Any, found: Comparison, metrics: Sequence[str], rows: int) -> None:
    columns = min(3, len(metrics))
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    *blocks, _, _ = found.values
    for axes, metric in zip(grid, metrics, strict=False):
        _metric(matplotlib, axes, found, metric)
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    handles, names = grid[0].get_legend_handles_labels()
    last = grid[len(metrics) - 1]
    if len(blocks) <= LEGEND_LIMIT:
        last.legend(handles, names, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8.5)
    else:
        grid[0].legend(handles[-2:], names[-2:], fontsize=8.5)
        colorbar(matplotlib, figure, last, blocks)


def _metric(matplotlib: ModuleType, axes: Any, found: Comparison, metric: str) -> None:
    looks, steps = _looks(matplotlib, found), _steps(found)
    for label, look in looks.items():
        values = [float("nan") if v is None else v for v in found.values[label][metric].values()]
        axes.plot(steps, values, label=shortened(shown(label), 24), marker="o", markersize=3.5, **look)
    unit = _unit(found) if metric in _SQUARED else ""
    axes.set_ylabel(f"{_LABELS[metric]}{unit}")
    if metric not in PLAIN and any(v for label in looks for v in found.values[label][metric].values()):
        axes.set_yscale("log")
    _bands(
        axes, steps, [(look["color"], list(found.intervals[label][metric].values())) for label, look in looks.items()]
    )
    _along(axes, found, steps)


def _looks(matplotlib: ModuleType, found: Comparison) -> dict[str, dict[str, Any]]:
    """How the line of each matrix looks."""
    *blocks, union, full = found.values
    palette = palette_of(matplotlib, len(blocks))
    looks: dict[str, dict[str, Any]] = {label: {"color": palette(index)} for index, label in enumerate(blocks)}
    looks[union] = {"color": INK, "dashes": (4, 2), "linewidth": 1.6}
    looks[full] = {"color": INK, "linewidth": 2.0}
    return looks


def _along(axes: Any, found: Comparison, steps: Sequence[float]) -> None:
    """The axis of the results."""
    if list(steps) == list(range(len(steps))):
        axes.set_xticks(steps, [shortened(name, 16) for name in found.names], rotation=30 if len(steps) > 5 else 0)
        axes.set_xlim(-0.3, len(steps) - 0.7)
    axes.set_xlabel(axis_name(found.names) if steps == varying_number(found.names) else "result")


def _points(found: Comparison, name: str) -> dict[str, list[Estimate | None]]:
    """An estimate of the population along the results, of each matrix that has it, without what is not to be shown."""
    rows = {label: found.of_population(label, name) for label in found.values}
    shown = {
        label: [e if e is not None and (e.warning is None or e.estimate is not None) else None for e in row]
        for label, row in rows.items()
    }
    return {label: row for label, row in shown.items() if any(row)}


def _population(matplotlib: ModuleType, figure: Any, found: Comparison, estimates: Sequence[str]) -> None:
    """A panel an estimate: points, or bars where there are ends alone, within bands where the interval holds."""
    levels = {e.level for name in estimates for row in _points(found, name).values() for e in row if e is not None}
    shares = " and ".join(f"{level:.0%}" for level in sorted(levels))
    figure.suptitle(f"Of the population, with {shares} intervals", x=0.012, ha="left", fontsize=9.5, weight="bold")
    grid = figure.subplots(1, len(_OF_POPULATION), squeeze=False).flatten().tolist()
    looks, steps = _looks(matplotlib, found), _steps(found)
    for axes, name in zip(grid, estimates, strict=False):
        for label, row in _points(found, name).items():
            look = looks[label]
            points = [float("nan") if e is None or e.estimate is None else e.estimate for e in row]
            axes.plot(steps, points, marker="o", markersize=3.5, **look)
            held = [e if e is not None and e.warning is None else None for e in row]
            ends = [(float("nan"), float("nan")) if e is None else (e.low, e.high) for e in held]
            axes.fill_between(steps, *zip(*ends, strict=True), color=look["color"], alpha=0.13, linewidth=0)
            axes.vlines(steps, *zip(*ends, strict=True), color=look["color"], linewidth=1.0, alpha=0.7)
        at = rf", $\kappa$ = {found.kappa:.2g}" if name == "effective_dimension" else ""
        axes.set_title(f"{_OF_POPULATION[name]}{at}", fontsize=9, pad=3)
        if name == "block_diagonal_error":
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.set_yscale("log")
        _along(axes, found, steps)
    for axes in grid[len(estimates) :]:
        axes.set_axis_off()


def _bands(axes: Any, steps: Sequence[float], intervals: Sequence[tuple[Any, Sequence[Interval | None]]]) -> None:
    """The intervals of a metric, each in its colour; those that reach far beyond all values do not set the axis."""
    axes.margins(y=0.15)
    limits = axes.get_ylim()
    for color, row in intervals:
        known = [(step, i.low, i.high) for step, i in zip(steps, row, strict=True) if i and i.known]
        if known:
            places, lows, highs = zip(*known, strict=True)
            axes.fill_between(places, lows, highs, color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(limits)


def _steps(found: Comparison) -> list[float]:
    """Where the results lie on the axis: at the number that their names differ in, if it rises, else in order."""
    numbers = varying_number(found.names)
    return numbers if numbers == sorted(numbers) and numbers else [float(index) for index in range(len(found.names))]


def _unit(found: Comparison) -> str:
    """Losses in nats have squared gradients in nats²."""
    return " (nats²)" if all(r.provenance.loss in _IN_NATS for r in found.results.values()) else ""


def _colors(matplotlib: ModuleType, count: int) -> Any:
    """The colour of each result: sequential, in their order."""
    colors = matplotlib.colormaps["viridis"]
    return lambda index: colors(0.88 * index / max(1, count - 1))
