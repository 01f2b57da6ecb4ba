"""What a command prints: `--format table` or `json`, and `--json`, short for the latter; and options as a decorator."""

from collections.abc import Callable
from functools import reduce
from typing import Any

import click

_SHORT = "fisherfunc.json"


def _remember(context: click.Context, _option: click.Parameter, given: bool) -> None:
    context.meta[_SHORT] = given


def _chosen(context: click.Context, _option: click.Parameter, form: str) -> str:
    return "json" if context.meta.get(_SHORT) else form


FORMAT = (
    click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        callback=_chosen,
        help="What to print.",
    ),
    click.option(
        "--json", is_flag=True, is_eager=True, expose_value=False, callback=_remember, help="Short for --format json."
    ),
)
"""Of every command that prints a result; `--json` is read before `--format`, wherever they stand."""


def as_options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator that adds some options, in this order."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)
