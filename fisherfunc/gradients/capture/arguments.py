"""The arguments of a call: what is among them, and others in their place. Every call of a model comes by here."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def leaves_among(values: Iterable[Any]) -> Iterator[Any]:
    """What there is among some values, and inside of lists, tuples and dictionaries among them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from leaves_among(value)
        elif isinstance(value, dict):
            yield from leaves_among(value.values())
        else:
            yield value


def exchanged(args: tuple[Any, ...], kwargs: Mapping[str, Any], instead: Mapping[int, Any]) -> tuple[Any, Any]:
    """Arguments with others in the place of some; what is inside of a list stays.

    Args:
        args: By position.
        kwargs: By name.
        instead: {id of an argument: what is to be there}.
    """
    if not instead:
        return args, kwargs
    return tuple(instead.get(id(value), value) for value in args), {
        key: instead.get(id(value), value) for key, value in kwargs.items()
    }
