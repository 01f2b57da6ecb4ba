"""What goes from one group of parameters to the next: the cotangents at the cut where that one starts.

They are N S d numbers, held in memory and, with a checkpoint, in files too; where a file is missing or damaged, the
stack is passed over again from the losses.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fisherfunc.gradients.checkpoint import Checkpoint
from fisherfunc.gradients.factored.collect import stack_pieces
from fisherfunc.gradients.factored.cuts import Leg
from fisherfunc.gradients.factored.groups import Group, Taken, leg_of
from fisherfunc.gradients.factored.known import Known, known_of
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
        self._legs = [leg_of(plan.groups, number, plan.levels) for number in range(len(plan.groups))]
        self._known: dict[int, Known] = {}
        self._above: dict[int, list[Tensor]] = {}
        self._below: dict[int, list[Tensor]] = {}

    def pieces(self, number: int, index: int, passed: Callable[[int], None]) -> Iterator[Piece]:
        """What a group takes of a stack; the cotangents where the next group starts are kept."""
        group, leg = self._plan.groups[number], self._legs[number]
        above = self._above[index] if index in self._above else self._recovered(number, index)
        if leg.end is not None:  # this group is the last to start there
            self._above.pop(index, None)
        kept = []
        for piece in self._passed(group, leg, index, above, passed):
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

    def ids(self, name: str) -> Tensor:
        """The ids that a parameter is looked up by, in ascending order."""
        return torch.cat([self._ids_of(name, index) for index in range(len(self._stacks))]).unique()

    def _ids_of(self, name: str, index: int) -> Tensor:
        known = self._known_of(index)
        nothing = self._stacks[index].rows.new_empty(0)
        return nothing if known is None else known.ids.get(name, nothing)

    def _recovered(self, number: int, index: int) -> list[Tensor]:
        """The cotangents where a group starts, chunk by chunk: from their file, or by the passes that led there."""
        start = self._plan.groups[number].start
        if not start:
            return []
        found = self._checkpoint.read(_part_of(start, index))
        if found is not None:
            named = unpacked(*found, device=next(iter(self._work.params.values())).device)[1]
            return [named[str(chunk)] for chunk in range(len(named))]
        before = max(n for n in range(number) if self._plan.groups[n].start < start)
        nothing = Group(items=frozenset(), start=self._plan.groups[before].start)
        pieces = self._passed(nothing, self._legs[before], index, self._recovered(before, index), lambda _: None)
        return [kept for kept in pieces if isinstance(kept, Tensor)]

    def _passed(
        self, group: Group, leg: Leg, index: int, above: Sequence[Tensor], passed: Callable[[int], None]
    ) -> Iterator[Piece | Tensor]:
        return stack_pieces(
            self._work,
            self._stacks[index],
            Taken(group=group, levels=self._plan.levels, leg=leg, above=above, known=self._known_of(index)),
            structure=self._plan.structure,
            chunk_size=self._plan.chunk_size,
            passed=passed,
        )

    def _known_of(self, index: int) -> Known | None:
        """What the model gives for a stack where passes start and at their floors, by one pass at first need."""
        if not self._plan.levels.cuts:
            return None
        if index not in self._known:
            calls = frozenset(call for leg in self._legs for call in (leg.start, leg.floor) if call is not None)
            structure, levels = self._plan.structure, self._plan.levels
            self._known[index] = known_of(
                self._work, self._stacks[index], structure, levels, leaves=structure.dense, calls=calls
            )
        return self._known[index]


def _part_of(level: int, stack: int | None = None) -> str:
    """The part of a checkpoint that holds the cotangents of a stack where a level starts; of all: how they begin."""
    return f"cotangents-{level}-{'' if stack is None else stack}"
