"""`fisherfunc` and `python -m fisherfunc`: the entry point, which needs nothing but the standard library to fail."""

import sys

EXTRAS = ("click", "rich", "matplotlib")


def main() -> None:
    """Run the command line; a package that is not installed is one readable line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows no λ is no reason to lose a result
    try:
        from fisherfunc.surface.cli import cli
    except KeyboardInterrupt:
        _leave("interrupted; nothing was written", 130)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _leave(f'error: the command line needs {error.name}; install it with pip install "fisherfunc[cli]"', 1)
    cli(prog_name="fisherfunc")


def _leave(message: str, status: int) -> None:
    print(f"fisherfunc: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
