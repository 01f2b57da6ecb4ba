"""A batch, or several, as sequences: each keeps its batch axis, of length 1. Views, no copies.

The model runs on one sequence at a time, so nothing of one sequence can reach another; what runs together has been seen
to give the same (stacks.py). Thousands of samples are few batches: nothing here is done sample by sample that need not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfunc.gradients.batches import joined, plain, same_shape
from fisherfunc.gradients.model_function import ordinary
from fisherfunc.records.axes import Batch
from fisherfunc.records.hashing import Column, hash_of_rows


@dataclass(frozen=True, kw_only=True)
class Part:
    """One batch, by its leaves.

    Attributes:
        leaves: What it holds.
        sliced: Which of these have a row a sequence; the others go with every sequence.
        form: The tree that the leaves are of.
        count: The number of sequences.
    """

    leaves: tuple[Any, ...]
    sliced: tuple[bool, ...]
    form: pytree.TreeSpec
    count: int

    @property
    def batch(self) -> Batch:
        """All of it."""
        return pytree.tree_unflatten(self.leaves, self.form)

    @cached_property
    def num_entries(self) -> int:
        """How many numbers a sequence has."""
        sizes = [leaf.numel() if isinstance(leaf, Tensor) else 0 for leaf in self.leaves]
        return sum(size // self.count if along else size for size, along in zip(sizes, self.sliced, strict=True))

    def rows(self, index: slice | list[int]) -> Batch:
        """Some of its sequences as a batch."""
        pairs = zip(self.leaves, self.sliced, strict=True)
        return pytree.tree_unflatten([leaf[index] if along else leaf for leaf, along in pairs], self.form)

    def columns(self) -> list[Column]:
        """Its leaves for a hash of rows."""
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(self.batch)[0]]
        return [Column(*column) for column in zip(paths, self.leaves, self.sliced, strict=True)]


class Sequences:
    """One-sequence batches, made when they are asked for.

    Args:
        parts: The batches that they are the rows of.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._where = [(part, row) for part in self._parts for row in range(part.count)]

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
        return Sequences([_part((p.batch, own), p.count) for p, own in zip(self._parts, columns, strict=True)])

    def hash(self) -> str:
        """`hash_of` the list of them: the same however they are divided into batches."""
        return hash_of_rows((part.columns(), part.count) for part in self._parts)


def split(batch: Batch) -> Sequences:
    """The sequences of a batch or of a list of batches, in order.

    A tensor with as many rows as there are sequences is sliced; one with a single row (GPT-2's position ids), or
    none, goes with every sequence.

    Raises:
        TypeError: If a batch is neither a mapping, nor a tuple, nor a list of these.
        ValueError: If there is no sequence, or a tensor has another number of rows.
    """
    return Sequences(_checked_parts(batch))


def one_by_one(batches: Sequence[Batch]) -> Sequences:
    """One-sequence batches that are not the rows of larger ones."""
    return Sequences([_part(batch, 1) for batch in batches])


def _checked_parts(batch: Batch) -> list[Part]:
    if isinstance(batch, list):
        if not batch:
            raise ValueError("the batch is empty: a list of no batches; give it a batch")
        return [part for one in batch for part in _checked_parts(one)]
    batch = pytree.tree_map_only(Tensor, ordinary, plain(batch))
    count = _num_sequences(batch)
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] not in (1, count):
            raise ValueError(
                f"batch{pytree.keystr(path)} has {leaf.shape[0]} rows, expected {count} (one a sequence) or 1 "
                f"(for all of them); its shape is {tuple(leaf.shape)}"
            )
    return [_part(batch, count)]


def _part(batch: Batch, count: int) -> Part:
    leaves, form = pytree.tree_flatten(batch)
    sliced = tuple(isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == count for leaf in leaves)
    return Part(leaves=tuple(leaves), sliced=sliced, form=form, count=count)


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
