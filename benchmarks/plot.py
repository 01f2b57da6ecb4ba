"""The plot: time and peak memory against N and against P, on log axes, with the floor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#7f7f7f", "#d98c21", "#1f5fa8", "#2f8f4e", "#a23b72")
_AXES = {"num_rows": "N, tokens", "num_params": "P, parameters"}


def plot(results: Mapping[str, Any], folder: Path, *, name: str = "benchmarks") -> list[Path]:
    """Write `name`.png and `name`.svg.

    Args:
        results: With "scaling" and "gemm_rates".
        folder: Where to.
        name: Of the files, without suffix.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex="col")
    for column, (axis, title) in enumerate(_AXES.items()):
        series = [one for one in results["scaling"] if one["axis"] == axis]
        for one, colour in zip(series, _COLOURS, strict=False):
            _line(panels[0][column], one, axis, "seconds", 1.0, colour)
            _line(panels[1][column], one, axis, "peak_bytes", 2**20, colour)
        _floor(panels[0][column], series, axis, results["gemm_rates"]["float32"])
        _label(panels, column, title, sorted({point[axis] for one in series for point in one["points"]}))
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=160)
    return paths


def _line(panel: Any, one: Mapping[str, Any], axis: str, quantity: str, unit: float, colour: str) -> None:
    points = [point for point in one["points"] if point[quantity]]
    if points:
        x, y = [point[axis] for point in points], [point[quantity] / unit for point in points]
        panel.loglog(x, y, marker="o", markersize=4, color=colour, label=one["contender"])


def _floor(panel: Any, series: Sequence[Mapping[str, Any]], axis: str, rate: float) -> None:
    """The floor's operations at the rate of matrix products in this run."""
    points = sorted({(point[axis], point["floor_operations"]) for one in series for point in one["points"]})
    if points:
        x, y = [at for at, _ in points], [operations / rate for _, operations in points]
        panel.loglog(x, y, linestyle="--", color="black", linewidth=1, label="floor")


def _label(panels: Any, column: int, title: str, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for panel, quantity in zip((panels[0][column], panels[1][column]), ("seconds", "peak MiB"), strict=True):
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(ticks, [_short(tick) for tick in ticks])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
        panel.grid(True, which="major", alpha=0.3)
        if column == 0:
            panel.set_ylabel(quantity)
    panels[1][column].set_xlabel(title)


def _short(count: int) -> str:
    """A tick: 126, or 4.5M."""
    return f"{count:,}" if count < 10**5 else f"{count / 1e6:.2g}M"
