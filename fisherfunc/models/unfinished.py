"""A call that does not end leaves no trace: plain attributes of the modules are put back as they were before it.

A pass may be cut short on purpose (the factored route stops at the output layer), or by an error. A counter, a flag or
a cache that the model would have reset at the end of the call would otherwise be there in the next one.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

OWN = frozenset(vars(nn.Module()))
"""What every module has: its parameters, buffers, children and hooks, which `functional_call` puts back itself."""


@contextmanager
def undone(module: nn.Module) -> Iterator[None]:
    """Put the attributes of all submodules back, and the entries of lists, dictionaries and sets, on any exception."""
    before = [(vars(part), _copies(vars(part))) for part in module.modules()]
    try:
        yield
    except BaseException:
        for attributes, copies in before:
            _reset(attributes, copies)
        raise


def _copies(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (value, copy.copy(value) if type(value) in (list, dict, set) else value)
        for key, value in attributes.items()
        if key not in OWN
    }


def _reset(attributes: dict[str, Any], copies: dict[str, tuple[Any, Any]]) -> None:
    for key in attributes.keys() - copies.keys() - OWN:
        del attributes[key]
    for key, (value, entries) in copies.items():
        if value is not entries:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(entries)
        attributes[key] = value
