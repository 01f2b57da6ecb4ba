"""Plots of a result. Figures are drawn without pyplot: no global state, no window, the same bytes every time.

`plot_spectrum` draws eigenvalue λ_k against rank k, both logarithmic, so that a power law is a straight line.
Each line is solid down to its own resolution floor and faint below it, where eigenvalues are round-off. What λ₁ of the
population lies between stands beside that of the tokens.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.surface.files import write_files
from fisherfunc.surface.plots.plot_style import INK, require_matplotlib, shortened, styled, subtitle, titles
from fisherfunc.surface.wording import matrix_name

FORMATS = ("png", "svg")
LEGEND_LIMIT = 12
_FEW_POINTS = 12
_NEAR = 100.0
_WARNING, _POPULATION = "#b3261e", "#00796b"


def plot_spectrum(result: FisherSpectrum) -> Any:
    """The spectra of all blocks, of the block-diagonal and of the full matrix, as a matplotlib `Figure`.

    Up to twelve blocks have a legend; more have a colour bar, in the order of the model.

    Args:
        result: What to draw.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    with styled(matplotlib):
        figure = matplotlib.figure.Figure(figsize=(7.6, 4.7), layout="constrained")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        axes = figure.add_subplot(xscale="log", yscale="log", xlabel="rank $k$", ylabel=r"eigenvalue $\lambda_k$")
        draw(matplotlib, figure, axes, result)
        titles(axes, f"Spectrum of the {matrix_name(result.provenance)}", subtitle(result.provenance))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is settled: every save gives the same picture
    return figure


def save_plot(figure: Any, path: str | os.PathLike[str]) -> list[Path]:
    """Write a figure as PNG and SVG, both or neither; the same figure gives the same bytes.

    Args:
        figure: A figure of this module.
        path: Where; the suffix is replaced by .png and .svg.

    Returns:
        The two paths.

    Raises:
        OSError: If a file cannot be written.
    """
    target = Path(path)
    contents = {f"{target.stem}.{kind}": rendered(figure, kind) for kind in FORMATS}
    return write_files(target.parent, contents)


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as the bytes of a "png" or "svg" file, without a date."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    buffer = io.BytesIO()
    with styled(require_matplotlib()):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def draw(matplotlib: ModuleType, figure: Any, axes: Any, result: FisherSpectrum, *, beside: bool = True) -> None:
    """Draw the spectra of a result on logarithmic axes.

    Args:
        matplotlib: The library.
        figure: That of the axes.
        axes: Where.
        result: What.
        beside: Whether a legend of few blocks stands beside the axes; a colour bar says which is which where not.
    """
    palette = palette_of(matplotlib, len(result.blocks))
    many = len(result.blocks) > LEGEND_LIMIT
    if len(result.blocks) == 1:
        line(
            axes,
            result.full,
            color=INK,
            label=f"{shortened(next(iter(result.blocks)))} (full matrix)",
            linewidth=2.0,
        )
    else:
        for index, (label, spectrum) in enumerate(result.blocks.items()):
            line(axes, spectrum, color=palette(index), label=shortened(label), linewidth=1.0 if many else 1.5)
        line(
            axes,
            result.block_diagonal,
            color=INK,
            label="block-diagonal",
            linewidth=1.6,
            dashes=(4, 2),
            zorder=4,
        )
        line(axes, result.full, color=INK, label="full matrix", linewidth=2.0, zorder=5)
    _limits(axes, result)
    _bracket(axes, result)
    _key(matplotlib, figure, axes, list(result.blocks), beside=beside)
    if len(result.block_diagonal.eigenvalues) <= _FEW_POINTS:
        axes.set_xscale("linear")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda rank, _: f"{rank:,.0f}")
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def line(axes: Any, spectrum: Spectrum, *, label: str, color: Any, dashes: Any = (), **style: Any) -> None:
    """One spectrum: solid down to its resolution, faint below it."""
    values = spectrum.eigenvalues.tolist()
    positive = [(rank, value) for rank, value in enumerate(values, start=1) if value > 0]
    resolved = [point for point in positive if point[1] > spectrum.resolution.item()]
    look = {"color": color, "dashes": dashes, "solid_capstyle": "round", **style}
    ring = {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.3}
    dot = {"marker": "o", "markersize": 4.5, **(ring if dashes else {})}
    dots = dot if len(resolved) <= _FEW_POINTS else {}
    axes.plot(*_columns(resolved), label=label, **look, **dots)
    if len(resolved) < len(positive):
        tail = positive[max(0, len(resolved) - 1) :]
        axes.plot(*_columns(tail), **(look | {"linewidth": 1.0, "alpha": 0.22}))


def _bracket(axes: Any, result: FisherSpectrum) -> None:
    """What λ₁ of the population lies between, beside that of these tokens, where the interval holds."""
    found = None if result.population is None else result.population.leading_eigenvalue
    if found is None or found.warning is not None or found.low <= 0:
        return
    axes.plot(
        [1, 1], [found.low, found.high], color=_POPULATION, marker="_", markersize=11, linewidth=2.2, zorder=6,
        label=f"λ₁ of the population ({found.level:.0%})",
    )  # fmt: skip
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, found.low / 3), max(top, 3 * found.high))


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [rank for rank, _ in points], [value for _, value in points]


def _limits(axes: Any, result: FisherSpectrum) -> None:
    """From half a decade above λ_max to half a decade below all that is resolved: the rest is round-off."""
    spectra = [s for s in (*result.blocks.values(), result.block_diagonal, result.full) if s.eigenvalues[0] > 0]
    if not spectra:
        axes.text(0.5, 0.5, "all eigenvalues are zero", transform=axes.transAxes, ha="center", va="center")
        axes.set(xlim=(0.85, 10), ylim=(0.1, 10), yticks=[])
        axes.minorticks_off()
        return
    bottom = min(max(s.eigenvalues[s.eigenvalues > 0].min(), s.resolution).item() for s in spectra)
    floor = result.full.resolution.item()
    bottom = min(bottom, floor) if floor * _NEAR > bottom else bottom
    longest = max(len(s.eigenvalues) for s in spectra)
    top = max(floor, *(s.eigenvalues[0].item() for s in spectra))  # in bfloat16 the floor may be above all
    axes.set(xlim=(0.85, max(longest, 2) * 1.18), ylim=(bottom / 3, 3 * top))
    if floor >= bottom:
        _floor(axes, floor)


def _floor(axes: Any, floor: float) -> None:
    axes.axhline(floor, color=_WARNING, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1.5)
    axes.annotate(
        "resolution of the full matrix",
        (0.012, floor),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        color=_WARNING,
        fontsize=8,
        va="top",
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
    )


def _key(matplotlib: ModuleType, figure: Any, axes: Any, labels: list[str], *, beside: bool) -> None:
    handles, names = axes.get_legend_handles_labels()
    if len(handles) == 1:
        axes.legend(loc="upper right", fontsize=8.5)
    elif len(labels) <= LEGEND_LIMIT and beside:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5)
    else:
        kept = slice(len(labels), None) if len(labels) > 1 else slice(None)
        place, size = ("upper right", 8.5) if beside else ("best", "small")
        axes.legend(handles[kept], names[kept], loc=place, fontsize=size)
        if len(labels) > 1:
            colorbar(matplotlib, figure, axes, labels)


def colorbar(matplotlib: ModuleType, figure: Any, axes: Any, labels: list[str]) -> None:
    """The colours of many blocks, with some of their labels."""
    count = len(labels)
    palette = palette_of(matplotlib, count)
    mappable = matplotlib.cm.ScalarMappable(
        norm=matplotlib.colors.Normalize(-0.5, count - 0.5),
        cmap=matplotlib.colors.ListedColormap([palette(index) for index in range(count)]),
    )
    ticks = sorted({round(step * (count - 1) / 6) for step in range(7)})
    bar = figure.colorbar(mappable, ax=axes, ticks=ticks, pad=0.02, aspect=32)
    bar.ax.set_yticklabels([shortened(labels[tick]) for tick in ticks], fontsize=8)
    bar.ax.invert_yaxis()
    bar.outline.set_visible(False)


def palette_of(matplotlib: ModuleType, count: int) -> Callable[[int], Any]:
    """The colour of each block: sequential in the order of the model, neither black nor too light."""
    colors = matplotlib.colormaps["plasma"]
    return lambda index: colors(0.05 + 0.80 * (index / max(1, count - 1)))
