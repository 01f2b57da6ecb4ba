"""Stacks: sequences of one shape that run through the model together, one row of a batch each.

Where the check finds that a sequence reaches another (certificate.py), a stack is one sequence.
The k-th tokens of all sequences of a stack are its slot k: one backward pass of a slot gives a row for each of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor

from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.data.slots import Slots
from fisherfunc.gradients.rows.gradient_rows import runs
from fisherfunc.linalg.grams.token_grams import Tokens
from fisherfunc.records.axes import Batch


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Sequences that run together, and their tokens.

    Attributes:
        members: Their numbers.
        batch: Their tensors.
        rows: `(k, b)`, the row of the Gram of slot k of each sequence; −1 where that has fewer tokens.
        position: `(k, b)`, the position of that token; 0 where there is none.
        entry: `(k, b)`, which of the losses of its sequence it is; 0 where there is none.
    """

    members: tuple[int, ...]
    batch: Batch
    rows: Int[Tensor, "k b"]
    position: Int[Tensor, "k b"]
    entry: Int[Tensor, "k b"]

    @property
    def width(self) -> int:
        """How many sequences."""
        return len(self.members)

    @property
    def num_slots(self) -> int:
        """The most tokens of a sequence."""
        return len(self.rows)

    @cached_property
    def slots(self) -> Slots:
        """All of them."""
        return Slots(self.rows)

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The first row of each sequence, and the one after its last."""
        return [(int(mine[0]), int(mine[-1]) + 1) for mine in self.slots.by_sequence]

    @property
    def num_tokens(self) -> int:
        """Of all its sequences."""
        return self.slots.num_tokens


def stacks_of(sequences: Sequences, tokens: Tokens, width: int) -> Iterator[Stack]:
    """The sequences that have a token, in stacks of at most `width` neighbours of one shape."""
    bounds = iter(list(runs(tokens.sequence)))
    members = tokens.sequence.unique_consecutive().tolist()
    for group in neighbours(members, sequences, width):
        yield _stack(group, sequences.joined(group), [next(bounds) for _ in group], tokens)


def around_fullest(sequences: Sequences, tokens: Tokens, width: int) -> tuple[int, list[int]]:
    """The sequence with the most tokens, and the members of the stack that it runs in."""
    fullest = int(tokens.sequence.bincount().argmax())
    members = tokens.sequence.unique_consecutive().tolist()
    return fullest, next(group for group in neighbours(members, sequences, width) if fullest in group)


def neighbours(members: Iterable[int], sequences: Sequences, width: int) -> Iterator[list[int]]:
    """Members in groups of at most `width`, each of one shape."""
    alike: list[list[int]] = []
    for _, some in groupby(members, key=sequences.batch_of):
        more = list(some)
        if alike and sequences.alike(more[0], alike[-1][0]):
            alike[-1] += more
        else:
            alike.append(more)
    for run in alike:
        yield from (run[first : first + width] for first in range(0, len(run), width))


def _stack(group: list[int], batch: Batch, bounds: list[tuple[int, int]], tokens: Tokens) -> Stack:
    slots = max(last - first for first, last in bounds)
    first = torch.tensor([start for start, _ in bounds], device=tokens.position.device)
    last = torch.tensor([stop for _, stop in bounds], device=tokens.position.device)
    rows = first + torch.arange(slots, device=first.device)[:, None]
    there = rows < last
    position, entry = (
        torch.where(there, column[rows.clamp(max=len(column) - 1)], 0) for column in (tokens.position, tokens.entry)
    )
    rows = torch.where(there, rows, -1)
    return Stack(members=tuple(group), batch=batch, rows=rows, position=position, entry=entry)
