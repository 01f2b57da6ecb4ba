"""One batch, whatever it is made of: read, cast, cut short, joined with others.

A batch is a mapping of keyword arguments, or `(*inputs, targets)`; sequences lie along axis 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from fisherfunc.gradients.data.documents import documents
from fisherfunc.gradients.data.sources import all_of, is_hugging_face, source_of
from fisherfunc.records.axes import Batch
from fisherfunc.records.containers import contents, flattened, is_named_tuple, mapped, rebuilt, steps

TARGET_KEYS = ("labels", "targets")
SINGLE = (type(None), bool, int, float, complex, str, bytes)
"""What has no parts."""
_FORMS = "a batch is a mapping of keyword arguments, a tuple (*inputs, targets), or a list of these"


class Aimed(NamedTuple):
    """Sequences with the targets of their positions, `(b, s, t)` or `(b, s, t, v)`, in place of those they had."""

    sequence: Batch
    targets: Tensor


def read(batch: Batch) -> list[Batch]:
    """What a user gives for a batch as a list of batches, each a dictionary or a tuple, with a tensor for its targets.

    `[*inputs, targets]`, which is what a DataLoader gives, is one batch: a tensor by itself is none. A dataclass is
    read as a mapping. Targets in numbers, or in an array of NumPy, become a tensor; inputs stay what they are. Packed
    rows are divided (documents.py). Of a source (sources.py) all is read: `pulled` in prepare.py reads what is needed.

    Raises:
        TypeError: If it has none of the forms of a batch, or can be read only once.
        ValueError: If it is empty, a DataLoader that shuffles, or packed and cannot be divided.
    """
    source = source_of(batch)
    if source is not None:
        return read(all_of(source))
    if not isinstance(batch, list):
        return documents(_with_tensor_targets(_plain(batch)))
    if not batch:
        raise ValueError("the batch is empty: a list of no batches; give it a batch")
    if len(batch) > 1 and any(isinstance(entry, Tensor | np.ndarray) for entry in batch):
        return read(tuple(batch))
    return [one for entry in batch for one in read(entry)]


def _plain(batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        if not all(isinstance(key, str) for key in batch):
            raise TypeError(f"{_FORMS}; got a mapping with keys {list(batch)[:3]}, expected names of arguments")
        splits = [key for key, value in batch.items() if is_hugging_face(value)]
        if splits:
            raise TypeError(f"got a {type(batch).__name__} of the data sets {splits}; pass one: batch[{splits[0]!r}]")
        return dict(batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch, tuple) and len(batch) >= 2 and not isinstance(batch, PackedSequence):
        return batch
    raise TypeError(f"{_FORMS}; got {_described(batch)}")


def _described(batch: Any) -> str:
    name = type(batch).__name__
    if isinstance(batch, tuple):
        return f"{name} of length {len(batch)}"
    if isinstance(batch, Dataset):
        return f"{name}; pass torch.utils.data.DataLoader(dataset, batch_size=…), or a list of its samples"
    if isinstance(batch, Iterator):
        return (
            f"{name}, which can be read only once; pass a list of what it gives, of a long one list(itertools.islice("
            "batches, 100)), or an object whose __iter__ begins anew"
        )
    if isinstance(batch, Tensor):
        return f"{name} without targets; pass (inputs, targets)"
    return name


def _with_tensor_targets(batch: Batch) -> Batch:
    if isinstance(batch, dict):
        return {key: _as_tensor(value) if key in TARGET_KEYS else value for key, value in batch.items()}
    names = getattr(batch, "_fields", range(len(batch)))
    of_targets = [name for name in names if name in TARGET_KEYS] or names[-1:]
    values = zip(names, batch, strict=True)
    return rebuilt(batch, [_as_tensor(value) if name in of_targets else value for name, value in values])


def _as_tensor(targets: Any) -> Any:
    """Numbers, alone, in lists or in an array, as a tensor; what is none of these as it is."""
    if isinstance(targets, np.ndarray | np.generic):
        known = np.ascontiguousarray(targets, dtype=targets.dtype.newbyteorder("="))
        return torch.tensor(known, device="cpu").reshape(targets.shape) if known.dtype.kind in "biuf" else targets
    leaves = [leaf for _, leaf in flattened(targets)]
    if not leaves or not all(isinstance(leaf, bool | int | float | np.number | np.bool_) for leaf in leaves):
        return targets
    try:
        return torch.tensor(targets, device="cpu")
    except (TypeError, ValueError):  # rows of different lengths, or no list: for the loss to read
        return targets


def by_name(batch: Batch) -> Mapping[str, Any] | None:
    """The entries of a batch by their names; None for a tuple none of whose entries is called targets."""
    if isinstance(batch, Mapping):
        return batch
    named = is_named_tuple(batch) and any(name in TARGET_KEYS for name in batch._fields)
    return dict(zip(batch._fields, batch, strict=True)) if named else None


def targets_of(batch: Batch) -> Any:
    """The targets of a batch: what is called so, or the last entry of a tuple; None where there are none."""
    named = by_name(batch)
    if named is None:
        return batch[-1]
    return next((named[key] for key in TARGET_KEYS if named.get(key) is not None), None)


def others_than_tensors(batch: Batch) -> str:
    """What of a batch is text, a number or an array, in words that can end an error; nothing where all are tensors."""
    held = {path: leaf for path, leaf in flattened(batch) if leaf is not None and not isinstance(leaf, Tensor)}
    if not held:
        return ""
    kinds = ", ".join(f"batch{path} is {type(leaf).__name__}" for path, leaf in list(held.items())[:3])
    text = any(isinstance(leaf, str) for leaf in held.values())
    return f"; {kinds}: {'has the text been through the tokenizer?' if text else 'should it be a tensor?'}"


def cast(batch: Batch, *, dtype: torch.dtype | None, device: torch.device | str | None) -> list[Batch]:
    """The batches that are meant, with floating-point tensors in `dtype` and all tensors on `device`.

    Targets keep float32 where `dtype` is coarser: class 257 is none of bfloat16's numbers.
    """

    def moved(leaf: Any, wanted: torch.dtype | None) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device=device, dtype=wanted if leaf.is_floating_point() else None)

    of_targets = None if dtype is None else torch.promote_types(dtype, torch.float32)

    def one(batch: Batch) -> Batch:
        targets = targets_of(batch)
        return mapped(lambda leaf: moved(leaf, of_targets if leaf is targets else dtype), batch)

    return [one(batch) for batch in read(batch)]


def shortened(sequence: Batch, length: int) -> Batch | None:
    """The first `length` positions of a one-sequence batch of token ids; None where it is not clear what to cut.

    Tensors whose second axis is as long as that of `input_ids` are cut there; a later axis of that length is not clear.
    """
    if isinstance(sequence, Aimed):  # a model that is cut short has no losses, and needs no targets
        short = shortened(sequence.sequence, length)
        return None if short is None else sequence._replace(sequence=short)
    ids = sequence.get("input_ids") if isinstance(sequence, dict) else None
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        return None
    if any(ids.shape[1] in value.shape[2:] for value in sequence.values() if isinstance(value, Tensor)):
        return None

    def cut(value: Any) -> Any:
        along = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == ids.shape[1]
        return value[:, :length] if along else value

    return {key: cut(value) for key, value in sequence.items()}


def same_shape(one: Any, other: Any) -> bool:
    """Whether two batches hold the same entries, tensors of one shape, so that they can be joined.

    A list of one entry, or without tensors, is not joined: it may be the sample's own, or for all of them.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        if one.ndim == 0:  # without an axis, they share one value
            return same and torch.equal(one, other)
        return same and (one.shape[0] == 1 or _where(one) == _where(other))
    if type(one) is not type(other):
        return False
    inside, others = _entries(one), _entries(other)
    if inside is None or others is None:
        return one is other or (isinstance(one, SINGLE) and one == other)
    if isinstance(one, list | tuple) and len(one) == 1:
        return False
    if inside and not any(isinstance(leaf, Tensor) for _, leaf in flattened(one)):
        return False
    return inside.keys() == others.keys() and all(same_shape(value, others[step]) for step, value in inside.items())


def _where(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Which numbers of memory a tensor of known shape and dtype has: a matrix and its transpose begin at the same."""
    return tensor.data_ptr(), tensor.stride()


def _entries(node: Any) -> dict[str, Any] | None:
    inside = contents(node)
    return None if inside is None else dict(zip(steps(node), inside, strict=True))


def joined(batches: Sequence[Batch]) -> Batch:
    """One-sequence batches of the same shape as one; a tensor that they share stays as it is."""
    first = batches[0]
    if isinstance(first, Tensor):
        shared = first.ndim == 0 or first.shape[0] != 1 or all(b.data_ptr() == first.data_ptr() for b in batches)
        return first if shared else torch.cat(list(batches))
    held = [entries for batch in batches if (entries := _entries(batch)) is not None]
    return rebuilt(first, [joined([entries[step] for entries in held]) for step in held[0]]) if held else first
