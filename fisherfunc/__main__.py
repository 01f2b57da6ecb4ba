"""`fisherfunc` and `python -m fisherfunc`: the entry point, which needs nothing but the standard library to fail."""

import os
import signal
import sys
from types import FrameType

EXTRAS = ("click", "rich", "matplotlib")


def main() -> None:
    """Run the command line; a package that is not installed, and an interrupt at any time, is one readable line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where interrupts are ignored, as by nohup
        signal.signal(signal.SIGINT, _interrupted)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no λ is no reason to lose a result
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported
    try:
        from fisherfunc.surface.cli import cli
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _leave(f'error: the command line needs {error.name}; install it with pip install "fisherfunc[cli]"', 1)
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on boundary.py knows what there is to say
    cli(prog_name="fisherfunc")


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    """Leave at once: an exception in the middle of an import may be swallowed there, or become another."""
    if sys.stderr is not None:
        print("fisherfunc: interrupted; nothing was written", file=sys.stderr, flush=True)
    os._exit(130)


def _leave(message: str, status: int) -> None:
    print(f"fisherfunc: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
