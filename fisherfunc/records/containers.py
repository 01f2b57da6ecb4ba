"""What holds the tensors of a batch: dictionaries and other mappings, lists, tuples, dataclasses, in any depth.

A container is taken apart and put together again as what it was: a model may ask for `batch.x` of its own class.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

IsLeaf = Callable[[str, Any], bool]
"""(way, container) → whether it counts as a leaf."""


def _none(path: str, node: Any) -> bool:
    return False


def contents(node: Any) -> list[Any] | None:
    """What a container holds, in order; None for a leaf.

    Example:
        >>> contents({"x": 1}), contents((1, 2)), contents(3)
        ([1], [1, 2], None)
    """
    if isinstance(node, Mapping):
        return list(node.values())
    if isinstance(node, list | tuple):
        return list(node)
    if is_dataclass(node) and not isinstance(node, type):
        return [getattr(node, field.name) for field in fields(node)]
    return None


def steps(node: Any) -> list[str]:
    """The ways from a container to what it holds, as Python writes them."""
    if isinstance(node, Mapping):
        return [f"[{key!r}]" for key in node]
    if is_named_tuple(node):
        return [f".{name}" for name in node._fields]
    if isinstance(node, list | tuple):
        return [f"[{place}]" for place in range(len(node))]
    return [f".{field.name}" for field in fields(node)]


def is_named_tuple(node: Any) -> bool:
    """Whether it is a tuple whose entries have names."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def rebuilt(node: Any, values: Sequence[Any]) -> Any:
    """A container of the same kind that holds other values in the places of its own."""
    if type(node) is dict or (isinstance(node, Mapping) and not isinstance(node, MutableMapping)):
        return dict(zip(node, values, strict=True))
    if isinstance(node, tuple):
        return type(node)(*values) if is_named_tuple(node) else tuple(values)
    if type(node) is list:
        return list(values)
    other = copy.copy(node)
    if isinstance(node, list):
        other[:] = values
    elif isinstance(node, MutableMapping):
        for key, value in zip(list(node), values, strict=True):
            other[key] = value
    else:
        for field, value in zip(fields(node), values, strict=True):
            object.__setattr__(other, field.name, value)  # also where it is frozen: the copy is ours
    return other


def flattened(tree: Any, is_leaf: IsLeaf = _none, path: str = "") -> Iterator[tuple[str, Any]]:
    """Its leaves in order, each with the way to it."""
    inside = None if is_leaf(path, tree) else contents(tree)
    if inside is None:
        yield path, tree
    else:
        for step, value in zip(steps(tree), inside, strict=True):
            yield from flattened(value, is_leaf, path + step)


def builder(tree: Any, is_leaf: IsLeaf = _none, path: str = "") -> Callable[[Iterator[Any]], Any]:
    """Leaves, in the order of `flattened` → the same tree of these."""
    inside = None if is_leaf(path, tree) else contents(tree)
    if inside is None:
        return next
    parts = [builder(value, is_leaf, path + step) for step, value in zip(steps(tree), inside, strict=True)]
    return lambda values: rebuilt(tree, [part(values) for part in parts])


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree with a function of each of its leaves in its place."""
    inside = contents(tree)
    return function(tree) if inside is None else rebuilt(tree, [mapped(function, value) for value in inside])
