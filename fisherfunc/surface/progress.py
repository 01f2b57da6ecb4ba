"""A progress bar on standard error, where that is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from fisherfunc.records.axes import Progress

SPEED_OVER_S = 3600.0
"""Over how long the speed is averaged, in seconds: chunks may be minutes apart, and later ones slower than the first.

What an earlier run has done comes in the first report, and a speed is measured from that on.
"""


@contextmanager
def progress_bar(*, quiet: bool = False, doing: str = "gradients") -> Iterator[Progress]:
    """A bar with counts and the remaining time, on standard error; nothing where that is a file or a pipe.

    Args:
        quiet: Whether to show nothing in a terminal either.
        doing: What is counted.

    Yields:
        The function to call as `progress(done, total)`.

    Raises:
        ImportError: If rich is not installed.
    """
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
