"""One batch, whatever it is made of: cast, cut short, joined with others."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfunc.records.axes import Batch


class Aimed(NamedTuple):
    """Sequences with the targets of their positions, `(b, s, t)` or `(b, s, t, v)`, in place of those they had."""

    sequence: Batch
    targets: Tensor


def plain(batch: Batch) -> Batch:
    """A batch as a dictionary or a tuple.

    Raises:
        TypeError: If it is neither a mapping nor a tuple.
    """
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and len(batch) >= 2:
        return batch
    raise TypeError(
        f"a batch is a mapping of keyword arguments, a tuple (*inputs, targets), or a list of these; "
        f"got {type(batch).__name__}{f' of length {len(batch)}' if isinstance(batch, tuple) else ''}"
    )


def cast(batch: Batch, *, dtype: torch.dtype | None, device: torch.device | str | None) -> Batch:
    """The batch with floating-point tensors in `dtype` and all tensors on `device`."""
    if isinstance(batch, list):
        return [cast(one, dtype=dtype, device=device) for one in batch]

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    return pytree.tree_map(moved, plain(batch))


def shortened(sequence: Batch, length: int) -> Batch | None:
    """The first `length` positions of a one-sequence batch of token ids; None where it is not clear what to cut.

    Tensors whose second axis is as long as that of `input_ids` are cut there; a later axis of that length is not clear.
    """
    if isinstance(sequence, Aimed):  # a model that is cut short has no losses, and needs no targets
        short = shortened(sequence.sequence, length)
        return None if short is None else sequence._replace(sequence=short)
    ids = sequence.get("input_ids") if isinstance(sequence, dict) else None
    if ids is None or any(ids.shape[1] in value.shape[2:] for value in sequence.values() if isinstance(value, Tensor)):
        return None

    def cut(value: Any) -> Any:
        along = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == ids.shape[1]
        return value[:, :length] if along else value

    return {key: cut(value) for key, value in sequence.items()}


def same_shape(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same entries, tensors of one shape, so that they can be joined."""
    entries, others = _entries(one), _entries(other)
    return entries.keys() == others.keys() and all(_alike(value, others[key]) for key, value in entries.items())


def _entries(batch: Batch) -> dict[Any, Any]:
    """What a batch holds, by key or place."""
    return batch if isinstance(batch, dict) else dict(enumerate(batch))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and (one.ndim > 0 or torch.equal(one, other))  # without an axis, they share one value
    if isinstance(one, list | tuple | dict) and type(one) is type(other):
        return len(one) == len(other) and same_shape(one, other)
    return type(one) is type(other) and bool(one == other)


def joined(batches: Sequence[Batch]) -> Batch:
    """One-sequence batches as one; a tensor that they share stays as it is."""
    first = batches[0]
    if isinstance(first, Tensor):
        shared = first.ndim == 0 or first.shape[0] != 1 or all(b.data_ptr() == first.data_ptr() for b in batches)
        return first if shared else torch.cat(list(batches))
    if isinstance(first, dict):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, list | tuple):
        parts = [joined(entries) for entries in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first
