"""What goes from one group of parameters to the next: the cotangents at the cut where that one starts.

They are N S d numbers, held in memory and, with a checkpoint, in files too; where a file is missing or damaged, the
stack is passed over again from the losses.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from fisherfunc.gradients.checkpoint import Checkpoint
from fisherfunc.gradients.factored.collect import stack_pieces
from fisherfunc.gradients.factored.groups import Group, Taken, leg_of
from fisherfunc.gradients.factored.pieces import Piece
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factored.store import packed, unpacked
from fisherfunc.gradients.stacks import Stack
from fisherfunc.gradients.workload import Workload


class Descent:
    """Passes over stacks, each from where the ones before it left the cotangents of its tokens.

    Args:
        work: What to pass over.
        stacks: Its sequences.
        plan: How.
        checkpoint: Where cotangents are kept too.
    """

    def __init__(self, work: Workload, stacks: Sequence[Stack], plan: FactoredPlan, checkpoint: Checkpoint) -> None:
        self._work, self._stacks, self._plan, self._checkpoint = work, stacks, plan, checkpoint
        self._above: dict[int, list[Tensor]] = {}
        self._below: dict[int, list[Tensor]] = {}

    def pieces(self, number: int, index: int, passed: Callable[[int], None]) -> Iterator[Piece]:
        """What a group takes of a stack; the cotangents where the next group starts are kept."""
        leg = leg_of(self._plan.groups, number, self._plan.levels)
        group = self._plan.groups[number]
        above = self._at_start(group, index)
        if leg.end is not None:  # this group is the last to start there
            self._above.pop(index, None)
        taken = Taken(group=group, levels=self._plan.levels, leg=leg, above=above)
        kept = []
        for piece in self._passed(taken, index, passed):
            if isinstance(piece, Tensor):
                kept.append(piece)
            else:
                yield piece
        if leg.end is not None:
            self._below[index] = kept
            if self._checkpoint.keeps:
                part = _part_of(self._plan.groups[number + 1].start, index)
                self._checkpoint.write(part, *packed([], {str(chunk): t for chunk, t in enumerate(kept)}))

    def done(self, number: int) -> None:
        """Go on to the next group."""
        groups = self._plan.groups
        if number + 1 == len(groups) or groups[number + 1].start > groups[number].start:
            self._above, self._below = self._below, {}
            self._checkpoint.drop(_part_of(groups[number].start))

    def _at_start(self, group: Group, index: int) -> list[Tensor]:
        """The cotangents of a stack where a group starts, chunk by chunk; none where that is at the losses."""
        if not group.start or index in self._above:
            return self._above.get(index, [])
        found = self._checkpoint.read(_part_of(group.start, index))
        if found is not None:
            named = unpacked(*found, device=next(iter(self._work.params.values())).device)[1]
            return [named[str(chunk)] for chunk in range(len(named))]
        nothing = (Group(items=frozenset()), group)
        taken = Taken(group=nothing[0], levels=self._plan.levels, leg=leg_of(nothing, 0, self._plan.levels))
        return [kept for kept in self._passed(taken, index, lambda _: None) if isinstance(kept, Tensor)]

    def _passed(self, taken: Taken, index: int, passed: Callable[[int], None]) -> Iterator[Piece | Tensor]:
        return stack_pieces(
            self._work,
            self._stacks[index],
            taken,
            structure=self._plan.structure,
            chunk_size=self._plan.chunk_size,
            passed=passed,
        )


def _part_of(level: int, stack: int | None = None) -> str:
    """The part of a checkpoint that holds the cotangents of a stack where a level starts; of all: how they begin."""
    return f"cotangents-{level}-{'' if stack is None else stack}"
