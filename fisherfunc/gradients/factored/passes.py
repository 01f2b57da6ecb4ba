"""The passes of a plan, group by group: pieces of all stacks to holders, holders to Grams.

A parameter is held until the last group that takes uses of it. So the Gram of a weight that ties the output layer to
the input embedding is made at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fisherfunc.gradients.alone import ALONE, Alone
from fisherfunc.gradients.capture.structure import Unsettled
from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint, stage_of
from fisherfunc.gradients.factored.descent import Descent
from fisherfunc.gradients.factored.groups import names_of
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factors.contract import Holder, NotLookedUp
from fisherfunc.gradients.rows.stacks import stacks_of
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.records.axes import Progress
from fisherfunc.runtime.memory import give_back


def passed_grams(
    work: Workload,
    plan: FactoredPlan,
    options: PassOptions,
    checkpoint: Checkpoint = NOWHERE,
    company: Alone = ALONE,
) -> dict[str, Tensor]:
    """The Grams of the parameters in the groups of a plan, by parameter or by the labels of the options.

    Raises:
        Unsettled: If the structure does not hold for some sequences.
    """
    try:
        return company.run(partial(_passed, work, plan, options, checkpoint, company))
    except NotLookedUp as found:
        raise Unsettled(replace(plan.structure, divisible=False)) from found


def _passed(
    work: Workload, plan: FactoredPlan, options: PassOptions, checkpoint: Checkpoint, company: Alone
) -> dict[str, Tensor]:
    grams: dict[str, Tensor] = {}
    like = next(iter(work.params.values()))
    stacks = list(stacks_of(work.sequences, work.tokens, plan.width))
    counted = Passes(checkpoint, [stack.num_tokens for stack in stacks], len(plan.groups), options.progress)
    descent = Descent(work, stacks, plan, checkpoint)
    holders: dict[str, Holder] = {}
    divided = len(plan.groups) > 1  # what a step freed is given back then: the next need not fit the pieces it lies in
    done = {n for n in range(len(plan.groups)) if company.finished(checkpoint, n, like) is not None}
    left = names_of(group for number, group in enumerate(plan.groups) if number not in done)
    for number, group in enumerate(plan.groups):
        finished = company.finished(checkpoint, number, like) if number in done else None
        later = names_of(plan.groups[number + 1 :])
        # Of a finished group, what another one waits for.
        taken = group.names if finished is None else group.names & later & left
        if divided:
            give_back()
        for name in taken:
            holders.setdefault(name, Holder(work.num_tokens))
        for index, stack in enumerate(stacks if taken else ()):
            for piece in descent.pieces(number, index, counted.of(number)):
                if piece.name in taken:
                    holders[piece.name].put(piece, stack)
        descent.done(number)
        company.taken(number)
        if divided:
            give_back()
        for name in (
            plan.segments.carried.keys() & {name for name, segment in group.items if segment == 0} & later & taken
        ):
            holders[name].settle(descent.ids(name), dtype=options.gram_dtype)
        closed = sorted(group.names - later)
        if finished is not None:
            grams |= finished
            for name in closed:
                holders.pop(name, None)
            continue
        new = {*map(options.label, closed)} - grams.keys()
        for label in new:
            shape = (work.num_tokens, company.columns(work))
            grams[label] = torch.empty(shape, dtype=options.gram_dtype, device=like.device)
        company.add({name: holders.pop(name) for name in closed}, grams, options.label, new)
        checkpoint.write(stage_of(number), {label: grams[label] for label in {*map(options.label, closed)}}, {})
    return grams


class Passes:
    """Counts what is passed over, first of all what an earlier run has kept.

    Args:
        checkpoint: Where that is kept.
        sizes: The tokens of each stack.
        num_groups: How many times they are passed over.
        progress: Called with the token passes done and their total.
    """

    def __init__(
        self, checkpoint: Checkpoint, sizes: Sequence[int], num_groups: int, progress: Progress | None
    ) -> None:
        self._progress, self._total = progress, sum(sizes) * num_groups
        self._kept = {group for group in range(num_groups) if checkpoint.has(stage_of(group))}
        self._done = sum(sizes) * len(self._kept)
        if self._kept:
            self._report()

    def of(self, group: int) -> Callable[[int], None]:
        """What to call with the tokens passed over in a group; of one that was kept they do not count again."""

        def passed(count: int) -> None:
            if group not in self._kept:
                self._done += count
                self._report()

        return passed

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)
