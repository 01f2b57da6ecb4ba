"""Slots of a stack: which row of the Gram each is, of each of the sequences, read once for all parameters.

Reading from a GPU waits for all that it was given to do. Axis order: c slots, b sequences.
"""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """The rows of the Gram; −1 where a sequence has fewer tokens."""

    rows: Int[Tensor, "c b"]

    @property
    def width(self) -> int:
        """How many sequences."""
        return self.rows.shape[1]

    @property
    def num_tokens(self) -> int:
        """How many there are of all sequences."""
        return int(self._there.sum())

    @cached_property
    def everywhere(self) -> bool:
        """Whether every sequence has a token in every slot."""
        return bool(self._there.all())

    @cached_property
    def by_sequence(self) -> list[Int[Tensor, " n"]]:
        """The rows of each sequence, on the CPU."""
        return [mine[mine >= 0] for mine in self._on_cpu.unbind(1)]

    @cached_property
    def first(self) -> list[int]:
        """The first row of each sequence; −1 where it has none."""
        return [int(mine[0]) if len(mine) else -1 for mine in self.by_sequence]

    @cached_property
    def present(self) -> Int[Tensor, " n"]:
        """The rows that there are, in the order of slots, then of sequences."""
        return self.flat(self.rows)

    def flat(self, values: Tensor) -> Tensor:
        """The values `(c, b, …)` of the rows that there are; copied only where some are not."""
        return values.flatten(0, 1) if self.everywhere else values[self._index]

    def of_sequence(self, values: Tensor, b: int) -> Tensor:
        """The values `(c, b, …)` of the rows of one sequence; a view where every sequence has all."""
        if self.everywhere:
            return values[:, b]
        return values[self._slots[b], b]

    @cached_property
    def _on_cpu(self) -> Tensor:
        return self.rows.cpu()

    @cached_property
    def _there(self) -> Tensor:
        return self._on_cpu >= 0

    @cached_property
    def _index(self) -> tuple[Tensor, ...]:
        return tuple(axis.to(self.rows.device) for axis in self._there.nonzero(as_tuple=True))

    @cached_property
    def _slots(self) -> list[Tensor]:
        return [mine.nonzero().squeeze(1).to(self.rows.device) for mine in self._there.unbind(1)]
