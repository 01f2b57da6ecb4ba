"""Frozen result records that are pytrees: tensors are leaves, everything else is static.

`torch.func.vmap`, `jacrev` and `torch.utils._pytree.tree_map` see through a record. Static fields travel in the tree's
context, so two records with different static fields have different tree structures; a tensor that is absent (None) is
static too. Notes travel there as well and make no difference: a stack of what several runs gave has those of the first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from torch.utils import _pytree as pytree

_Record = TypeVar("_Record")


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def record(*, static: Iterable[str] = (), notes: Iterable[str] = ()) -> Callable[[type[_Record]], type[_Record]]:
    """Make a class a frozen, keyword-only dataclass and register it as a pytree.

    Args:
        static: Fields that are not tensors (counts, names); all others are leaves or subtrees, or None where absent.
        notes: Of the static fields, those that only say how a value came about (metadata): no part of its structure.

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
    remarks = tuple(notes)
    known = tuple(name for name in static if name not in remarks)

    def decorate(cls: type[_Record]) -> type[_Record]:
        frozen: Any = dataclass(frozen=True, kw_only=True, eq=False)(cls)
        names = [field.name for field in fields(frozen)]
        _register(frozen, [n for n in names if n not in known and n not in remarks], known, remarks)
        return frozen

    return decorate


class _Notes(tuple):
    """What makes no difference between two structures."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Notes)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, _Notes)

    def __hash__(self) -> int:
        return hash(_Notes)


def _register(cls: type, tensors: list[str], static: tuple[str, ...], notes: tuple[str, ...]) -> None:
    def flatten(value: Any) -> tuple[list[Any], Any]:
        present = tuple(n for n in tensors if getattr(value, n) is not None)
        known = tuple(getattr(value, n) for n in static)
        return [getattr(value, n) for n in present], (present, known, _Notes(getattr(value, n) for n in notes))

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context = flatten(value)
        return [(pytree.GetAttrKey(n), c) for n, c in zip(context[0], children, strict=True)], context

    def unflatten(children: Iterable[Any], context: Any) -> Any:
        present, known, remarks = context
        value: Any = object.__new__(cls)  # past any validation: under vmap a leaf need not be a tensor
        content = dict.fromkeys(tensors) | dict(zip(present, children, strict=True))
        content |= dict(zip(static, known, strict=True)) | dict(zip(notes, remarks, strict=True))
        for name, child in content.items():
            object.__setattr__(value, name, child)
        return value

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
