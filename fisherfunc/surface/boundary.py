"""Where exceptions of the package become one readable line and an exit status; the only place that catches them.

| what happened | on standard error | status |
| --- | --- | --- |
| bad input, a missing file or package | `fisherfunc: error: …` (with --debug: the traceback) | 1 |
| wrong options | `fisherfunc: error: …` and where the help is | 2 |
| interrupted | `fisherfunc: interrupted; nothing was written` (or what was, or how to go on) | 130 |
| the reader of the output is gone (`| head -1`) | nothing | 0 |
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from io import UnsupportedOperation
from typing import Any

import click
import torch

from fisherfunc.surface.option_names import in_options
from fisherfunc.surface.visible import visible

EXPECTED = (ValueError, TypeError, KeyError, RuntimeError, OSError, ImportError, EOFError, MemoryError)


class Failure(click.ClickException):
    """An expected failure of a command."""


class Interrupted(click.ClickException):
    """The user stopped the command."""

    exit_code = 130


class Group(click.Group):
    """A click group whose every failure is one line on standard error."""

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run a command and exit; errors become one line."""
        settings["standalone_mode"] = False
        try:
            status = super().main(*args, **settings)
        except click.UsageError as error:
            help_hint = f"; see {error.ctx.command_path} --help" if error.ctx else ""
            message = _one_line(error.format_message()).rstrip(".")
            _leave(f"error: {message}{help_hint}", error.exit_code)
        except Interrupted as error:
            _leave(error.message, error.exit_code)
        except click.Abort:
            _leave("interrupted; nothing was written", Interrupted.exit_code)
        except click.ClickException as error:
            _leave(f"error: {_one_line(error.format_message())}", error.exit_code)
        sys.exit(status if isinstance(status, int) else 0)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the expected exceptions of a command into a `Failure`, unless its option `debug` is set."""

    @wraps(command)
    def run(*, debug: bool, **options: Any) -> None:
        try:
            command(**options)
        except (BrokenPipeError, SystemExit) as error:
            if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
                raise
            _discard_output()  # who reads it has read enough: no failure, of a table (rich exits) as of JSON
            raise click.exceptions.Exit(0) from error
        except KeyboardInterrupt as error:  # click would put an empty line before its own word
            raise Interrupted("interrupted; nothing was written") from error
        except EXPECTED as error:
            if debug:
                raise
            raise Failure(told(error)) from error

    return run


def _discard_output() -> None:
    """Have nothing left to flush into a closed pipe when the process ends."""
    with suppress(UnsupportedOperation):  # of a stream without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def told(error: BaseException) -> str:
    """Say what failed."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str(KeyError) is a repr
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"  # without the number
    if "--method lanczos" in str(error):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"out of memory ({_first_line(error)}); give a smaller --memory or fewer --tokens"
    return in_options(str(error)) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _leave(message: str, status: int) -> None:
    click.echo(f"fisherfunc: {visible(message)}", err=True)
    sys.exit(status)
