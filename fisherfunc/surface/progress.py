"""A progress bar: rich's on standard error where that is a terminal, tqdm's in a notebook."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fisherfunc.records.axes import Progress

SPEED_OVER_S = 3600.0
"""Over how long the speed is averaged, in seconds: chunks may be minutes apart, and later ones slower than the first.

What an earlier run has done comes in the first report, and a speed is measured from that on.
"""


@contextmanager
def progress_bar(*, quiet: bool = False, doing: str = "gradients", notebook: bool | None = None) -> Iterator[Progress]:
    """Show a bar with counts and the remaining time: in a notebook, or on standard error where that is a terminal.

    Args:
        quiet: Whether to show nothing there either.
        doing: What is counted.
        notebook: Whether this is a notebook; found out where None.

    Yields:
        The function that `progress=` of `fisher_spectrum` and its like takes, called as `progress(done, total)`.

    Raises:
        ImportError: If rich, or in a notebook tqdm, is not installed.

    Example:
        >>> with progress_bar(quiet=True) as progress:
        ...     progress(1, 2)  # fisher_spectrum(model, batch, progress=progress) calls it
    """
    here = _is_notebook() if notebook is None else notebook
    with (_in_a_notebook if here else _in_a_terminal)(quiet, doing) as report:
        yield report


def _is_notebook() -> bool:
    """Whether a Jupyter kernel runs this: its shell has a display."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


@contextmanager
def _in_a_notebook(quiet: bool, doing: str) -> Iterator[Progress]:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            f'the progress bar of a notebook needs tqdm ({error}); install it with pip install "fisherfunc[cli]"'
        ) from error
    with tqdm(desc=doing, disable=quiet, leave=False) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_description("eigenvalues" if done >= total else doing)

        yield report


@contextmanager
def _in_a_terminal(quiet: bool, doing: str) -> Iterator[Progress]:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError as error:
        raise ImportError(
            f'the progress bar needs rich ({error}); install it with pip install "fisherfunc[cli]"'
        ) from error
    console = Console(stderr=True)
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=32),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        speed_estimate_period=SPEED_OVER_S,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task("reading the model", total=None)

        def report(done: int, total: int) -> None:
            description = "eigenvalues" if done >= total else doing
            bar.update(task, completed=done, total=total, description=description)

        yield report
