"""The way down: passes over stacks, each from where those before it left the cotangents of its tokens.

Between two groups lie the cotangents at what outer calls returned, N S d numbers, held in memory and, with a
checkpoint, in files too; where a file is missing or damaged, the stack is passed over again from the losses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fisherfunc.gradients.capture.calls import Output
from fisherfunc.gradients.checkpoint import Checkpoint
from fisherfunc.gradients.factored.collect import recorded_of, stack_pieces
from fisherfunc.gradients.factored.groups import Group, Recorded, Taken, names_of, passed_by
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factors.pieces import Piece
from fisherfunc.gradients.rows.stacks import Stack
from fisherfunc.gradients.rows.workload import Workload

Cotangents = list[Mapping[Output, Tensor]]
"""Of one stack, chunk by chunk."""


class Descent:
    """Passes over stacks, group by group.

    Args:
        work: What to pass over.
        stacks: Its sequences.
        plan: How.
        checkpoint: Where cotangents are kept too.
    """

    def __init__(self, work: Workload, stacks: Sequence[Stack], plan: FactoredPlan, checkpoint: Checkpoint) -> None:
        self._work, self._stacks, self._plan, self._checkpoint = work, stacks, plan, checkpoint
        self._recorded: dict[int, Recorded] = {}
        self._above: dict[int, Cotangents] = {}
        self._below: dict[int, Cotangents] = {}

    def pieces(self, number: int, index: int, passed: Callable[[int], None]) -> Iterator[Piece]:
        """What a group takes of a stack; the cotangents where the next group starts are kept."""
        goes_on = passed_by(self._plan.groups, number, self._plan.segments)[1]
        above = self._above[index] if index in self._above else self._recovered(number, index)
        if goes_on:  # this group is the last to start there
            self._above.pop(index, None)
        below: Cotangents | None = [] if goes_on else None
        yield from self._passed(number, self._plan.groups[number], index, above, below, passed)
        if below is not None:
            self._below[index] = [{output: _at_rest(t) for output, t in chunk.items()} for chunk in below]
            part = _part_of(self._plan.groups[number + 1].start, index)
            self._checkpoint.write(part, _named(self._below[index]), {})

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
        recorded = self._recorded_of(index)
        nothing = self._stacks[index].rows.new_empty(0)
        return nothing if recorded is None else recorded.ids.get(name, nothing)

    def _recovered(self, number: int, index: int) -> Cotangents:
        """The cotangents where a group starts: from their file, or by the passes that led there."""
        start = self._plan.groups[number].start
        if not start:
            return []
        found = self._checkpoint.read(_part_of(start, index))
        if found is not None:
            device = next(iter(self._work.params.values())).device
            return _chunks({name: tensor.to(device, copy=True) for name, tensor in found[0].items()})
        before = max(n for n in range(number) if self._plan.groups[n].start < start)
        nothing = Group(items=frozenset(), start=self._plan.groups[before].start)
        below: Cotangents = []
        for _ in self._passed(before, nothing, index, self._recovered(before, index), below, lambda _: None):
            pass
        return [{output: _at_rest(t) for output, t in chunk.items()} for chunk in below]

    def _passed(
        self,
        number: int,
        group: Group,
        index: int,
        above: Cotangents,
        below: Cotangents | None,
        passed: Callable[[int], None],
    ) -> Iterator[Piece]:
        plan = self._plan
        last, _ = passed_by(plan.groups, number, plan.segments)
        beside = [other for other in plan.groups if plan.groups[number].start <= other.start <= last]
        taken = Taken(
            group=group,
            expected=frozenset(names_of(beside)) | frozenset(plan.slabbed),
            segments=plan.segments,
            last=last,
            above=above,
            below=below,
            recorded=self._recorded_of(index),
        )
        stack = self._stacks[index]
        yield from stack_pieces(
            self._work, stack, taken, structure=plan.structure, chunk_size=plan.chunk_size, passed=passed
        )

    def _recorded_of(self, index: int) -> Recorded | None:
        """What the outer calls return for a stack, by one pass at first need."""
        if not self._plan.segments.ends:
            return None
        if index not in self._recorded:
            stack, plan = self._stacks[index], self._plan
            self._recorded[index] = recorded_of(self._work, stack, plan.structure, plan.segments)
        return self._recorded[index]


def _at_rest(cotangent: Tensor) -> Tensor:
    """The same as it lies in memory after it was read from a file: products depend on strides and alignment."""
    begins = cotangent.is_contiguous() and cotangent.storage_offset() == 0
    return cotangent if begins else cotangent.clone(memory_format=torch.contiguous_format)


def _named(below: Cotangents) -> dict[str, Tensor]:
    return {f"{chunk}.{n}.{i}": t for chunk, here in enumerate(below) for (n, i), t in here.items()} | {
        f"{chunk}.": torch.zeros(0, device="cpu") for chunk in range(len(below))
    }


def _chunks(named: Mapping[str, Tensor]) -> Cotangents:
    found: dict[int, dict[Output, Tensor]] = {}
    for name, tensor in named.items():
        chunk, *output = name.split(".")
        here = found.setdefault(int(chunk), {})
        if output != [""]:
            here[int(output[0]), int(output[1])] = tensor
    return [found[chunk] for chunk in range(len(found))]


def _part_of(segment: int, stack: int | None = None) -> str:
    """The part of a checkpoint that holds the cotangents of a stack where a segment starts; of all: how they begin."""
    return f"cotangents-{segment}-{'' if stack is None else stack}"
