"""What the plots have in common: their style, titles and shortened labels. No global state is touched."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.wording import count_of_units, model_name

INK = "#1a1a1a"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.hashsalt": "fisherfunc",
    "svg.fonttype": "path",
    "savefig.dpi": 160,
}


def shortened(label: str, longest: int = 34) -> str:
    """The label, without its middle where it is long."""
    return label if len(label) <= longest else f"{label[: longest // 2 - 1]}…{label[-longest // 2 :]}"


def subtitle(provenance: Provenance) -> list[str]:
    """What a plot is of: model, number of units, loss and dtype, as far as they are known, and if it is approximate.

    Example:
        >>> subtitle(Provenance(num_tokens=9, loss="regression", approximations=["gradients projected …"]))
        ['9 tokens', 'regression', 'approximate']
    """
    model = model_name(provenance)
    parts = [shortened(model, 60)] if model else []
    known = [text for text in (provenance.loss, provenance.dtype) if text]
    certified = provenance.method == "lanczos"  # the error bars are what there is to say
    marks = ["approximate"] if provenance.approximations and not certified else []
    return [*parts, count_of_units(provenance), *known, *marks]


def titles(axes: Any, title: str, parts: list[str]) -> None:
    """A title, and under it what the plot is of.

    Args:
        axes: Where.
        title: The title.
        parts: Of the line under it.
    """
    axes.set_title(title, pad=23)
    axes.annotate(
        "  ·  ".join(parts),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        fontsize=8.5,
        color="#5f5f5f",
    )


@contextmanager
def styled(matplotlib: ModuleType) -> Iterator[None]:
    """Matplotlib's own defaults and this style, whatever the user's settings are; they are restored."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def require_matplotlib() -> ModuleType:
    """Matplotlib, or an error that names the extra.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError(f'plots need matplotlib ({error}); install it with pip install "fisherfunc[plot]"') from error
    return matplotlib
