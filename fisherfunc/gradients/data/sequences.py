"""A batch, or several, as sequences: each keeps its batch axis, of length 1. Views, no copies.

The model runs on one sequence at a time, so nothing of one sequence can reach another; what runs together has been seen
to give the same (stacks.py). Thousands of samples are few batches: nothing here is done sample by sample that need not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fisherfunc.gradients.autodiff.model_function import ordinary
from fisherfunc.gradients.data.batches import SINGLE, by_name, joined, read, same_shape, targets_of
from fisherfunc.records.axes import Batch
from fisherfunc.records.containers import builder, contents, flattened, is_named_tuple, mapped, steps
from fisherfunc.records.hashing import Column, hash_of_rows


@dataclass(frozen=True, kw_only=True)
class Part:
    """One batch.

    Attributes:
        batch: All of it.
        count: The number of sequences.
        own: The ways to what is no tensor and has an entry a sequence.
        unclear: The ways to what is no tensor and may be the sequences' own or for all of them: whether it has an
            entry for each. Nothing is unclear of one sequence.
        bare: Whether it is one sample that may lack the axis of samples.
    """

    batch: Batch
    count: int
    own: frozenset[str] = frozenset()
    unclear: dict[str, bool] = field(default_factory=dict)
    bare: bool = False

    def _is_leaf(self, path: str, node: Any) -> bool:
        return path in self.own

    @cached_property
    def leaves(self) -> tuple[Any, ...]:
        """What it holds."""
        return tuple(leaf for _, leaf in flattened(self.batch, self._is_leaf))

    @cached_property
    def sliced(self) -> tuple[bool, ...]:
        """Which of its leaves have a row a sequence; the others go with every sequence."""
        return tuple(
            path in self.own or (isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.count)
            for path, leaf in flattened(self.batch, self._is_leaf)
        )

    @cached_property
    def num_entries(self) -> int:
        """How many numbers a sequence has."""
        sizes = [leaf.numel() if isinstance(leaf, Tensor) else 0 for leaf in self.leaves]
        return sum(size // self.count if along else size for size, along in zip(sizes, self.sliced, strict=True))

    @cached_property
    def _built(self) -> Callable[[Iterator[Any]], Batch]:
        return builder(self.batch, self._is_leaf)

    def rows(self, index: slice | list[int]) -> Batch:
        """Some of its sequences as a batch."""
        pairs = zip(self.leaves, self.sliced, strict=True)
        return self._built(_taken(leaf, index) if along else leaf for leaf, along in pairs)

    def columns(self) -> list[Column]:
        """Its leaves for a hash of rows."""
        paths = [path for path, _ in flattened(self.batch, self._is_leaf)]
        return [Column(*column) for column in zip(paths, self.leaves, self.sliced, strict=True)]


def _taken(leaf: Any, index: slice | list[int]) -> Any:
    """Some entries of a tensor, array, list or tuple, as one."""
    if isinstance(leaf, Tensor | np.ndarray) or isinstance(index, slice):
        return leaf[index]
    return type(leaf)(leaf[place] for place in index)


class Sequences:
    """One-sequence batches, made when they are asked for.

    Args:
        parts: The batches that they are the rows of.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._where = [(part, row) for part in self._parts for row in range(part.count)]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The batches that they are the rows of."""
        return self._parts

    def __len__(self) -> int:
        """How many."""
        return len(self._where)

    def __getitem__(self, number: int) -> Batch:
        """One of them."""
        part, row = self._where[number]
        return part.rows(slice(row, row + 1))

    def __iter__(self) -> Iterator[Batch]:
        """All of them, in order."""
        return (self[number] for number in range(len(self)))

    def batch_of(self, number: int) -> int:
        """Which of the batches one of them came in, by its identity."""
        return id(self._where[number][0])

    def alike(self, one: int, other: int) -> bool:
        """Whether two of them can be joined."""
        return self._where[one][0] is self._where[other][0] or same_shape(self[one], self[other])

    def joined(self, members: Sequence[int]) -> Batch:
        """Some of them as one batch; a tensor that they share stays as it is."""
        part, first = self._where[members[0]]
        if any(self._where[member][0] is not part for member in members):
            return joined([self[member] for member in members])
        rows = [self._where[member][1] for member in members]
        following = rows == list(range(first, first + len(rows)))
        return part.rows(slice(first, first + len(rows)) if following else rows)

    def num_entries(self, number: int) -> int:
        """How many numbers one of them has."""
        return self._where[number][0].num_entries

    def beside(self, column: Tensor) -> "Sequences":
        """Pairs of a sequence and its row of a tensor, `(1, ...)`."""
        columns = column.split([part.count for part in self._parts])
        pairs = zip(self._parts, columns, strict=True)
        return Sequences(
            [replace(p, batch=(p.batch, rows), own=frozenset(f"[0]{path}" for path in p.own)) for p, rows in pairs]
        )

    def hash(self) -> str:
        """`hash_of` the list of them: the same however they are divided into batches."""
        return hash_of_rows((part.columns(), part.count) for part in self._parts)


def split(batch: Batch) -> Sequences:
    """The sequences of a batch or of a list of batches, in order.

    A tensor with as many rows as there are sequences is sliced; one with a single row (GPT-2's position ids), or
    none, goes with every sequence. So are lists and arrays, as far as can be told without the model (readings.py).

    Raises:
        TypeError: If a batch is neither a mapping, nor a tuple, nor a list of these, or holds what has no rows.
        ValueError: If there is no sequence, or a tensor has another number of rows.
    """
    return Sequences([_part(one) for one in read(batch)])


def one_by_one(batches: Sequence[Batch]) -> Sequences:
    """One-sequence batches that are not the rows of larger ones."""
    return Sequences([Part(batch=batch, count=1) for batch in batches])


def _part(batch: Batch) -> Part:
    for path, leaf in flattened(batch, lambda path, node: isinstance(node, PackedSequence)):
        _check_has_rows(f"batch{path}", leaf)
    batch = mapped(lambda leaf: ordinary(leaf) if isinstance(leaf, Tensor) else leaf, batch)
    targets = targets_of(batch)
    if _is_bare(batch, targets):
        return Part(batch=_with_row_of_targets(batch, targets), count=1, bare=True)
    count = _num_sequences(batch)
    found = dict(_no_tensors("", batch, count))
    own = frozenset(path for path, node in found.items() if _has_entries(node, count) and not _has_rows(node, count))
    unclear = {path: _has_entries(node, count) for path, node in found.items()} if count > 1 else {}
    for path, leaf in flattened(batch, lambda path, node: path in found):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] not in (1, count):
            raise ValueError(
                f"batch{path} has {leaf.shape[0]} rows, expected {count} (one a sequence) or 1 (for all of them); its "
                f"shape is {tuple(leaf.shape)}. A sample without an axis of samples gets it by [None]; graphs, or bags "
                "of ids, that lie one after the other go in a list of batches, one each"
            )
    return Part(batch=batch, count=count, own=own, unclear=unclear)


def _check_has_rows(name: str, leaf: Any) -> None:
    """Raise where sequences cannot be the rows of a leaf."""
    if isinstance(leaf, PackedSequence):
        raise TypeError(
            f"{name} is a packed sequence, whose rows are positions of several sequences; pass it padded, and pack it "
            "inside the model"
        )
    if not isinstance(leaf, Tensor):
        return
    if leaf.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; pass it padded (torch.nested.to_padded_tensor), with a mask, or in a list of "
            "batches of one sequence"
        )
    if leaf.layout != torch.strided:
        raise TypeError(f"{name} is sparse ({leaf.layout}), expected a dense tensor; pass {name}.to_dense()")
    if leaf.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values; pass a tensor with values")


def _is_bare(batch: Batch, targets: Any) -> bool:
    """Whether a batch is one sample that may lack the axis of samples: of one target, and inputs of other lengths."""
    if not isinstance(targets, Tensor) or targets.numel() == 0:
        return False
    others = [leaf for leaf in _tensors(batch) if leaf is not targets and leaf.ndim]
    return targets.ndim == 0 or (targets.shape[0] == 1 and any(leaf.shape[0] != 1 for leaf in others))


def _with_row_of_targets(batch: Batch, targets: Tensor) -> Batch:
    return batch if targets.ndim else mapped(lambda leaf: leaf[None] if leaf is targets else leaf, batch)


def _no_tensors(path: str, node: Any, count: int) -> Iterator[tuple[str, Any]]:
    """The ways to what is no tensor and may have an entry a sequence, or hold something of all of them.

    A list of tensors that has another length is a container, and the rows of its tensors are the sequences.
    """
    inside = contents(node)
    if inside is None:
        single = isinstance(node, (*SINGLE, Tensor, np.generic, torch.dtype, torch.device)) or callable(node)
        if not single and not (isinstance(node, np.ndarray) and node.ndim == 0):
            yield path, node
    elif path and _is_list(node) and node and (len(node) == count or not _tensors(node)):
        yield path, node
    else:
        for step, value in zip(steps(node), inside, strict=True):
            yield from _no_tensors(path + step, value, count)


def _is_list(node: Any) -> bool:
    return isinstance(node, list | tuple) and not is_named_tuple(node)


def _has_entries(node: Any, count: int) -> bool:
    return (_is_list(node) or isinstance(node, np.ndarray)) and len(node) == count


def _has_rows(node: Any, count: int) -> bool:
    """Whether the rows of the tensors in a list may be the sequences."""
    sized = [tensor for tensor in _tensors(node) if tensor.ndim]
    return bool(sized) and all(tensor.shape[0] in (1, count) for tensor in sized)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in flattened(tree) if isinstance(leaf, Tensor)]


def _num_sequences(batch: Batch) -> int:
    named = by_name(batch)
    leading = [targets_of(batch)] if named is None else [named.get("input_ids"), targets_of(batch)]
    arrays = [leaf for _, leaf in flattened(batch) if isinstance(leaf, np.ndarray)]
    found = [*leading, *_tensors(batch), *arrays]
    sized = [leaf for leaf in found if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim]
    if not sized:
        raise ValueError(
            f"the batch holds no tensor: {batch!r}; expected at least input_ids, or inputs and targets; a tokenizer "
            "gives tensors with return_tensors='pt'"
        )
    if 0 in sized[0].shape:
        raise ValueError(f"the batch is empty: its first tensor has shape {tuple(sized[0].shape)}; give it a sequence")
    return sized[0].shape[0]
