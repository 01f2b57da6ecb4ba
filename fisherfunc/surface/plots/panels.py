"""`ff.plots`: each picture of a result as a function to matplotlib axes, to be put on a figure of one's own.

    result → Axes          spectrum, density, cumulative_trace, profile, couplings, effective_dimension
    several → Axes         evolution

Without `ax` a figure is made, in the style of this package and without pyplot: `axes.figure` shows it at the end of a
notebook's cell, and `axes.figure.savefig("x.pdf")` writes it.
On axes that are given, fonts and sizes are the user's. Blocks are coloured in the order of the model by a map of even
lightness, which colour-blind readers can follow; of many, a colour bar beside the axes says which is which.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch

from fisherfunc.linalg import metrics
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.comparing.compare import compare
from fisherfunc.pipeline.comparing.comparison import Comparison
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.sheets import unit_of
from fisherfunc.statistics.density import effective_dimension_curve, spectral_density
from fisherfunc.surface.plots import plots
from fisherfunc.surface.plots.axis import axis_name, varying_number
from fisherfunc.surface.plots.plot_style import INK, require_matplotlib, shortened, styled

__all__ = ["couplings", "cumulative_trace", "density", "effective_dimension", "evolution", "profile", "spectrum"]

_SAMPLE, _POPULATION = INK, "#00796b"
_TICKS = 24
_FEW = 4
"""Blocks that a legend names; of more it would cover the lines of a picture of one column's width."""
_WRITTEN = 8
"""Blocks whose couplings are written as numbers."""


def spectrum(result: FisherSpectrum, *, ax: Any = None) -> Any:
    """Draw the eigenvalues of all blocks, of the block-diagonal and of the full matrix, against their rank.

    Both axes are logarithmic. Lines are faint below their resolution, where eigenvalues are round-off.

    Args:
        result: What to draw.
        ax: Matplotlib axes to draw on; those of a new figure where None.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with _on(ax, size=(7.0, 4.2)) as axes:
        axes.set(xscale="log", yscale="log", xlabel="rank $k$", ylabel=rf"eigenvalue $\lambda_k$ ({_unit(result)})")
        plots.draw(require_matplotlib(), axes.figure, axes, result, beside=ax is None)
    return axes


def density(result: FisherSpectrum | Spectrum, *, num_bins: int = 40, ax: Any = None) -> Any:
    """Draw how many eigenvalues there are per decade, as far as they are resolved.

    Args:
        result: A result, of which the full matrix is drawn, or one spectrum.
        num_bins: How many bins of equal width on the logarithmic axis.
        ax: Matplotlib axes to draw on; those of a new figure where None.

    Returns:
        The axes.

    Raises:
        ValueError: If there are no bins, or no eigenvalue is resolved.
        ImportError: If matplotlib is not installed.
    """
    found = spectral_density(result.full if isinstance(result, FisherSpectrum) else result, num_bins=num_bins)
    with _on(ax) as axes:
        axes.stairs(found.density.tolist(), found.edges.tolist(), fill=True, color=INK, alpha=0.25)
        axes.stairs(found.density.tolist(), found.edges.tolist(), color=INK, linewidth=1.2)
        axes.set(xscale="log", xlabel=rf"eigenvalue $\lambda$ ({_unit(result)})", ylabel="eigenvalues per decade")
        if found.num_below:
            note = f"{found.num_below:,} below the resolution"
            axes.annotate(note, (0.02, 0.97), xycoords="axes fraction", va="top", fontsize="small")
    return axes


def cumulative_trace(result: FisherSpectrum, *, ax: Any = None) -> Any:
    """Draw the share of the trace that the leading eigenvalues hold, against how many they are.

    Args:
        result: What to draw; a matrix that is zero has no line.
        ax: Matplotlib axes to draw on; those of a new figure where None.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    with _on(ax) as axes:
        for label, (part, look) in _looks(result).items():
            total = part.eigenvalues.sum()
            if total > 0:
                shares = (part.eigenvalues.cumsum(0) / total).tolist()
                axes.plot(range(1, len(shares) + 1), shares, label=label, **look)
        axes.set(xscale="log", xlabel="leading eigenvalues", ylabel="share of the trace", ylim=(0, 1.03))
        _key(axes, result, loc="lower right")
    return axes


def profile(result: FisherSpectrum, metric: str = "trace", *, ax: Any = None) -> Any:
    """Draw a metric of each block, in the order of the model.

    Args:
        result: What to draw.
        metric: Its name in `ff.metrics`, as in the columns of `to_dataframe()`.
        ax: Matplotlib axes to draw on; those of a new figure where None.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no such metric.
        ImportError: If matplotlib is not installed.
    """
    _check(metric)
    labels = list(result.blocks)
    values = [_number(metrics.SUMMARY[metric](part)) for part in result.blocks.values()]
    with _on(ax) as axes:
        axes.plot(range(len(labels)), values, color=INK, marker="o", markersize=4, linewidth=1.0)
        shown = _places(len(labels))
        axes.set_xticks(shown, [shortened(labels[at], 20) for at in shown], rotation=45, ha="right")
        axes.set_ylabel(_named(metric, result))
        positive = [value for value in values if value > 0]
        if positive and max(positive) > 20 * min(positive):
            axes.set_yscale("log")
    return axes


def couplings(result: FisherSpectrum, *, of: str = "sample", ax: Any = None) -> Any:
    """Draw the alignment ‖F_ab‖²/(‖F_aa‖ ‖F_bb‖) of every pair of blocks as a heat map.

    Args:
        result: What to draw.
        of: "sample", of these tokens, or "population"; what has no estimate there is left white.
        ax: Matplotlib axes to draw on; those of a new figure where None.

    Returns:
        The axes.

    Raises:
        ValueError: If the result has none, or `of` is neither.
        ImportError: If matplotlib is not installed.
    """
    if of not in ("sample", "population"):
        raise ValueError(f"couplings expected of='sample' or of='population', got of={of!r}")
    if result.coupling is None or (of == "population" and result.population is None):
        raise ValueError(f"this result has no couplings of the {of}; take the spectrum of Grams of several sequences")
    rows: Sequence[Sequence[float]] = result.coupling.alignment
    if of == "population" and result.population is not None:
        found = result.population.coupling.alignment
        rows = [[math.nan if entry.estimate is None else entry.estimate for entry in row] for row in found]
    labels = result.coupling.labels
    with _on(ax) as axes:
        image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=1)
        shown = _places(len(labels))
        names = [shortened(labels[at], 20) for at in shown]
        axes.set_xticks(shown, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(shown, names)
        axes.grid(visible=False)
        for a, b in ((a, b) for a in range(len(labels)) for b in range(len(labels)) if len(labels) <= _WRITTEN):
            colour = "white" if rows[a][b] > 0.55 else INK
            axes.text(b, a, f"{rows[a][b]:.2f}", ha="center", va="center", fontsize="small", color=colour)
        axes.figure.colorbar(image, ax=axes, label=f"alignment of blocks, of the {of}")
    return axes


def evolution(results: Comparison | Mapping[str, FisherSpectrum], metric: str = "trace", *, ax: Any = None) -> Any:
    """Draw a metric along results, checkpoints of a training run say, by block and of the full matrix.

    Names that differ in one number are placed at that number. Bands are confidence intervals, where results have some.

    Args:
        results: What `ff.compare` gave, or {name: result}.
        metric: Its name in `ff.metrics`.
        ax: Matplotlib axes to draw on; those of a new figure where None.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no such metric, or results are not to be compared.
        ImportError: If matplotlib is not installed.
    """
    _check(metric)
    found = results if isinstance(results, Comparison) else compare(dict(results))
    names, first = list(found.results), next(iter(found.results.values()))
    numbers = varying_number(names)
    places: list[float] = numbers or [float(at) for at in range(len(names))]
    with _on(ax) as axes:
        for label, (_, look) in _looks(first).items():
            row = found.values[label][metric]
            axes.plot(places, [_number(row[name]) for name in names], label=label, marker="o", markersize=3.5, **look)
            bands = [found.intervals[label][metric][name] for name in names]
            if all(band is not None for band in bands):
                ends = [[getattr(band, end) for band in bands] for end in ("low", "high")]
                axes.fill_between(places, *ends, color=look["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel=axis_name(names) if numbers else "", ylabel=_named(metric, first))
        if not numbers:
            axes.set_xticks(places, [shortened(name, 16) for name in names], rotation=30, ha="right")
        if metric in _OVER_DECADES:
            axes.set_yscale("log")
        _key(axes, first, loc="best")
    return axes


def effective_dimension(result: FisherSpectrum, *, ax: Any = None) -> Any:
    """Draw the effective dimension Σ λ/(λ + κ) against the damping κ, of these tokens and of the population.

    That of the population has its band; where these tokens do not resolve it, there is a band and no point.

    Args:
        result: What to draw.
        ax: Matplotlib axes to draw on; those of a new figure where None.

    Returns:
        The axes.

    Raises:
        ValueError: If no eigenvalue is resolved.
        ImportError: If matplotlib is not installed.
    """
    largest, floor = float(result.full.eigenvalues[0]), float(result.full.resolution)
    if not largest > floor:
        raise ValueError(f"no eigenvalue is resolved: the largest is {largest:.2e}, the resolution {floor:.2e}")
    found = None if result.population is None else result.population.effective_dimension
    low = max(floor, largest * 1e-6) if found is None else min(found.kappas)
    ends, like = (math.log10(low), math.log10(10 * largest)), result.full.eigenvalues
    gammas = torch.logspace(*ends, 80, dtype=torch.float64, device=like.device)
    own = effective_dimension_curve(result.full, gammas)
    with _on(ax) as axes:
        axes.plot(own.gamma.tolist(), own.dimension.tolist(), color=_SAMPLE, ls="--", label="of these tokens")
        if found is not None:
            _population(axes, found)
        axes.set(
            xscale="log", yscale="log", xlabel=rf"damping $\kappa$ ({_unit(result)})", ylabel="effective dimension"
        )
        axes.legend(fontsize="small")
    return axes


def _population(axes: Any, found: Any) -> None:
    """The band, and points where there are such."""
    known = [(k, e) for k, e in zip(found.kappas, found.estimates, strict=True) if e.warning is None]
    if not known:
        return
    level = known[0][1].level
    ends = [[getattr(e, end) for _, e in known] for end in ("low", "high")]
    axes.fill_between(
        [k for k, _ in known], *ends, color=_POPULATION, alpha=0.2, linewidth=0, label=f"{level:.0%} band"
    )
    points = [(k, e.estimate) for k, e in known if e.estimate is not None]
    axes.plot([k for k, _ in points], [d for _, d in points], color=_POPULATION, label="of the population")


_OVER_DECADES = ("largest", "second", "smallest", "gap", "condition_number", "trace")
_SQUARED = ("largest", "second", "smallest", "gap", "trace")


def _check(metric: str) -> None:
    if metric not in metrics.SUMMARY:
        raise ValueError(f"no metric {metric!r}; expected one of {list(metrics.SUMMARY)}")


def _unit(result: Any) -> str:
    return unit_of(result.provenance) if isinstance(result, FisherSpectrum) else "nats²"


def _named(metric: str, result: FisherSpectrum) -> str:
    words = metric.replace("_", " ")
    return f"{words} ({_unit(result)})" if metric in _SQUARED else words


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _places(count: int) -> list[int]:
    return list(range(count)) if count <= _TICKS else sorted({round(i * (count - 1) / 12) for i in range(13)})


def _looks(result: FisherSpectrum) -> dict[str, tuple[Spectrum, dict[str, Any]]]:
    """{label: (spectrum, how its line looks)}: the blocks, and the whole matrices where there are several."""
    palette = plots.palette_of(require_matplotlib(), len(result.blocks))
    looks = {label: {"color": palette(index), "linewidth": 1.3} for index, label in enumerate(result.blocks)}
    *_, union, full = result.matrices
    looks[union] = {"color": INK, "linewidth": 1.5, "dashes": (4, 2)}
    looks[full] = {"color": INK, "linewidth": 2.0}
    return {label: (result.matrices[label], look) for label, look in looks.items()}


def _key(axes: Any, result: FisherSpectrum, *, loc: str) -> None:
    handles, names = axes.get_legend_handles_labels()
    few = len(result.blocks) <= _FEW
    kept = slice(None) if few else slice(-2, None)
    axes.legend(handles[kept], [shortened(name, 20) for name in names[kept]], loc=loc, fontsize="small")
    if not few:
        plots.colorbar(require_matplotlib(), axes.figure, axes, list(result.blocks))


class _on(AbstractContextManager[Any]):  # noqa: N801 (used as a function)
    """The axes to draw on: those given, in the user's style, or those of a new figure, in ours."""

    def __init__(self, ax: Any, size: tuple[float, float] = (4.6, 3.3)) -> None:
        self._size = size
        self._matplotlib: ModuleType = require_matplotlib()
        self._ax = ax
        self._style: AbstractContextManager[Any] = nullcontext() if ax is not None else styled(self._matplotlib)

    def __enter__(self) -> Any:
        self._style.__enter__()
        if self._ax is None:
            figure: Any = self._matplotlib.figure.Figure(figsize=self._size, layout="constrained")
            figure._repr_png_ = partial(plots.rendered, figure, "png")  # notebooks show it, with and without pyplot
            self._matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
            self._ax = figure.add_subplot()
        return self._ax

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)
