"""Frozen result records that are pytrees: tensors are leaves, everything else is static.

`torch.func.vmap`, `jacrev` and `torch.utils._pytree.tree_map` see through a record. Static fields travel
in the tree's context, so two records with different static fields have different tree structures.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from torch.utils import _pytree as pytree

_Record = TypeVar("_Record")


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def record(*, static: Iterable[str] = ()) -> Callable[[type[_Record]], type[_Record]]:
    """Make a class a frozen, keyword-only dataclass and register it as a pytree.

    Args:
        static: Fields that are not tensors (counts, names, metadata); all others are leaves or subtrees.

    Returns:
        A class decorator. Equality is identity: tensors have no truth value to compare by.

    Example:
        >>> import torch
        >>> @record(static=("name",))
        ... class Point:
        ...     position: torch.Tensor
        ...     name: str
        >>> moved = pytree.tree_map(lambda x: x + 1, Point(position=torch.zeros(1), name="a"))
        >>> moved.position.item(), moved.name
        (1.0, 'a')
    """
    static_names = tuple(static)

    def decorate(cls: type[_Record]) -> type[_Record]:
        frozen: Any = dataclass(frozen=True, kw_only=True, eq=False)(cls)
        names = [field.name for field in fields(frozen)]
        _register(frozen, [n for n in names if n not in static_names], static_names)
        return frozen

    return decorate


def _register(cls: type, leaves: list[str], static: tuple[str, ...]) -> None:
    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, n) for n in leaves], tuple(getattr(value, n) for n in static)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context = flatten(value)
        return [(pytree.GetAttrKey(n), c) for n, c in zip(leaves, children, strict=True)], context

    def unflatten(children: Iterable[Any], context: Any) -> Any:
        value: Any = object.__new__(cls)  # past any validation: under vmap a leaf need not be a tensor
        for name, child in [*zip(leaves, children, strict=True), *zip(static, context, strict=True)]:
            object.__setattr__(value, name, child)
        return value

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
