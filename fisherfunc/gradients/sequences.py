"""A batch, or several, as a list of sequences: each keeps its batch axis, of length 1. Views, no copies.

The model runs on one sequence at a time, so nothing of one sequence can reach another.
"""

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfunc.gradients.model_function import ordinary
from fisherfunc.records.axes import Batch


def split(batch: Batch) -> list[Batch]:
    """The sequences of a batch or of a list of batches, in order.

    A tensor with as many rows as there are sequences is sliced; one with a single row (GPT-2's position ids), or
    none, goes with every sequence.

    Raises:
        TypeError: If a batch is neither a mapping, nor a tuple, nor a list of these.
        ValueError: If there is no sequence, or a tensor has another number of rows.
    """
    if isinstance(batch, list):
        if not batch:
            raise ValueError("the batch is empty: a list of no batches; give it a batch")
        return [sequence for one in batch for sequence in split(one)]
    batch = pytree.tree_map_only(Tensor, ordinary, _plain(batch))
    count = _num_sequences(batch)
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] not in (1, count):
            raise ValueError(
                f"batch{pytree.keystr(path)} has {leaf.shape[0]} rows, expected {count} (one a sequence) or 1 "
                f"(for all of them); its shape is {tuple(leaf.shape)}"
            )
    return list(_rows(batch, count))


def cast(batch: Batch, *, dtype: torch.dtype | None, device: torch.device | str | None) -> Batch:
    """The batch with floating-point tensors in `dtype` and all tensors on `device`."""
    if isinstance(batch, list):
        return [cast(one, dtype=dtype, device=device) for one in batch]

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    return pytree.tree_map(moved, _plain(batch))


class Aimed(NamedTuple):
    """Sequences with the targets of their positions, `(b, s, t)` or `(b, s, t, v)`, in place of those they had."""

    sequence: Batch
    targets: Tensor


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


def _plain(batch: Batch) -> Batch:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and len(batch) >= 2:
        return batch
    raise TypeError(
        f"a batch is a mapping of keyword arguments, a tuple (*inputs, targets), or a list of these; "
        f"got {type(batch).__name__}{f' of length {len(batch)}' if isinstance(batch, tuple) else ''}"
    )


def _num_sequences(batch: Batch) -> int:
    if isinstance(batch, dict):
        leading = [batch[key] for key in ("input_ids", "labels", "targets") if isinstance(batch.get(key), Tensor)]
    else:
        leading = [batch[-1]]
    tensors = [leaf for leaf in leading + pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise ValueError(f"the batch holds no tensor: {batch!r}; expected at least input_ids, or inputs and targets")
    if tensors[0].numel() == 0:
        raise ValueError(
            f"the batch is empty: its first tensor has shape {tuple(tensors[0].shape)}; give it a sequence"
        )
    return tensors[0].shape[0]


def _rows(batch: Batch, count: int) -> Iterator[Batch]:
    leaves, form = pytree.tree_flatten(batch)
    sliced = [isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count for leaf in leaves]
    columns = [leaf.split(1) if along else repeat(leaf, count) for leaf, along in zip(leaves, sliced, strict=True)]
    for row in zip(*columns, strict=True):
        yield pytree.tree_unflatten(row, form)
