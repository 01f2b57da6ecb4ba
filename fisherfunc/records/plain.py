"""What JSON can hold of dataclasses of sets, tuples and mappings, and back, equal and in the same order; of dtypes."""

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

PACKAGE = __name__.split(".")[0]


def to_plain(value: Any) -> Any:
    """What JSON can hold of a value.

    Raises:
        TypeError: If there is something in it that `from_plain` could not give back.

    Example:
        >>> to_plain({("a", 1): frozenset({"c", "b"})})
        {'dict': [[{'tuple': ['a', 1]}, {'frozenset': ['b', 'c']}]]}
        >>> from_plain(to_plain({("a", 1): (None, 2.5)}))
        {('a', 1): (None, 2.5)}
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [to_plain(entry) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [to_plain(entry) for entry in value]}
    if isinstance(value, frozenset):
        return {"frozenset": [to_plain(entry) for entry in sorted(value)]}
    if isinstance(value, Mapping):
        return {"dict": [[to_plain(key), to_plain(entry)] for key, entry in value.items()]}
    if is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        return {"record": [type(value).__module__, type(value).__qualname__, entries]}
    raise TypeError(f"expected plain values, collections or dataclasses, got {type(value).__name__}: {value!r}")


def from_plain(value: Any) -> Any:
    """What `to_plain` was given.

    Raises:
        ValueError: If a dataclass is not one of this package.
    """
    if isinstance(value, list):
        return [from_plain(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "record":
        return _record(*content)
    if kind == "dict":
        return {from_plain(key): from_plain(entry) for key, entry in content}
    return {"tuple": tuple, "frozenset": frozenset}[kind](from_plain(entry) for entry in content)


def _record(module: str, name: str, entries: dict[str, Any]) -> Any:
    known = getattr(sys.modules.get(module), name, None) if module.split(".")[0] == PACKAGE else None
    if not is_dataclass(known) or not isinstance(known, type):
        raise ValueError(f"expected a dataclass of {PACKAGE}, got {module}.{name}")
    return known(**{field: from_plain(entry) for field, entry in entries.items()})


def dtype_name(dtype: torch.dtype) -> str:
    """The name without its module.

    Example:
        >>> dtype_name(torch.float64)
        'float64'
    """
    return str(dtype).removeprefix("torch.")
