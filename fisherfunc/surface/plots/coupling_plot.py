"""A heat map of how the blocks of F hang together: the alignment ‖F_ab‖²/(‖F_aa‖ ‖F_bb‖) of every pair."""

import math
from collections.abc import Sequence
from typing import Any

from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.surface.plots.plot_style import INK, require_matplotlib, shortened, styled, subtitle, titles
from fisherfunc.surface.wording import matrix_name

WRITTEN_LIMIT = 12
_TICKS = 24
_DARK = 0.55
_INCHES = 0.065  # a letter


def plot_couplings(result: FisherSpectrum) -> Any:
    """The alignments of all pairs of blocks, as a matplotlib `Figure`; up to twelve blocks with their numbers.

    Those of these tokens and, where the result has them, beside them those of the population: a sample counts each
    token with itself, which makes its blocks look alike.

    Args:
        result: What to draw.

    Raises:
        ValueError: If the result has no couplings.
        ImportError: If matplotlib is not installed.
    """
    if result.coupling is None:
        raise ValueError("this result has no couplings, as of gradients at hand; take the spectrum of Grams")
    matplotlib = require_matplotlib()
    labels, panels = result.coupling.labels, _panels(result)
    count = len(labels)
    few = count <= WRITTEN_LIMIT
    places = range(count) if count <= _TICKS else sorted({round(i * (count - 1) / 12) for i in range(13)})
    names = [shortened(labels[place]) for place in places]
    under = [shortened(part, 28) for part in subtitle(result.provenance)[:2]]
    under += [f"‖F − F_bd‖/‖F‖ = {_errors(result)}"]
    margin = _INCHES * max(map(len, names))
    side = max(3.2, 0.52 * count) if few else 6.2
    width = max(len(panels) * side + 1.2, _INCHES * len("  ·  ".join(under)) + 1.0)
    with styled(matplotlib):
        size = (width + margin, side + 0.75 * margin + 1.1)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (heading, alignment) in zip(grid, panels.items(), strict=True):
            image = axes.imshow(alignment, cmap="Blues", vmin=0, vmax=1)
            axes.set_anchor("W")
            axes.set_xticks(list(places), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
            axes.set_yticks(list(places), names, fontsize=8)
            axes.grid(visible=False)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            if len(panels) > 1:
                axes.set_xlabel(heading, fontsize=9)
            for row, column in ((a, b) for a in range(count if few else 0) for b in range(count)):
                value = alignment[row][column]
                color = "white" if value > _DARK else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)
        bar = figure.colorbar(image, ax=list(grid), pad=0.02, aspect=28, shrink=0.9)
        bar.set_label("alignment of the blocks' Grams", fontsize=8.5)
        bar.outline.set_visible(False)
        titles(grid[0], f"Couplings in the {matrix_name(result.provenance)}", under)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is settled: every save gives the same picture
    return figure


def _panels(result: FisherSpectrum) -> dict[str, Sequence[Sequence[float]]]:
    """{heading: alignments}; one that does not exist, of a block without an estimate, is not a number."""
    assert result.coupling is not None
    found: dict[str, Sequence[Sequence[float]]] = {"of these tokens": result.coupling.alignment}
    if result.population is not None:
        rows = result.population.coupling.alignment
        found["of the population"] = [[math.nan if e.estimate is None else e.estimate for e in row] for row in rows]
    return found


def _errors(result: FisherSpectrum) -> str:
    assert result.coupling is not None
    own = f"{result.coupling.block_diagonal_error:.1%}"
    error = None if result.population is None else result.population.block_diagonal_error.estimate
    return own if error is None else f"{own} of these tokens, {error:.1%} of the population"
