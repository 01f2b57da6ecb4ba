"""The passes of a plan, group by group: pieces of all stacks to holders, holders to Grams.

A parameter is held until the last group that takes uses of it. So the Gram of a weight that ties the output layer to
the input embedding is made at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint, finished_grams, stage_of
from fisherfunc.gradients.factored.contract import Holder, NotLookedUp
from fisherfunc.gradients.factored.cotangents import Descent
from fisherfunc.gradients.factored.groups import names_of
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factored.store import Passes, part_of, pieces_through
from fisherfunc.gradients.factored.structure import Unsettled
from fisherfunc.gradients.memory import give_back
from fisherfunc.gradients.stacks import stacks_of
from fisherfunc.gradients.workload import PassOptions, Workload
from fisherfunc.linalg.threads import Workspace


def passed_grams(
    work: Workload, plan: FactoredPlan, options: PassOptions, checkpoint: Checkpoint = NOWHERE
) -> dict[str, Tensor]:
    """The Grams of the parameters in the groups of a plan, by parameter or by the labels of the options.

    Raises:
        Unsettled: If the structure does not hold for some sequences.
    """
    try:
        return _passed(work, plan, options, checkpoint)
    except NotLookedUp as found:
        raise Unsettled(replace(plan.structure, cuttable=False)) from found


def _passed(work: Workload, plan: FactoredPlan, options: PassOptions, checkpoint: Checkpoint) -> dict[str, Tensor]:
    grams: dict[str, Tensor] = {}
    like = next(iter(work.params.values()))
    stacks = list(stacks_of(work.sequences, work.tokens, plan.width))
    counted = Passes(checkpoint, [stack.num_tokens for stack in stacks], len(plan.groups), options.progress)
    descent = Descent(work, stacks, plan, checkpoint)
    holders: dict[str, Holder] = {}
    divided = len(plan.groups) > 1  # what a step freed is given back then: the next need not fit the pieces it lies in
    left = names_of(g for number, g in enumerate(plan.groups) if finished_grams(checkpoint, number, like) is None)
    for number, group in enumerate(plan.groups):
        finished = finished_grams(checkpoint, number, like)
        later = names_of(plan.groups[number + 1 :])
        # Of a finished group, what another one waits for.
        taken = group.names if finished is None else group.names & later & left
        if divided:
            give_back()
        for name in taken:
            holders.setdefault(name, Holder(work.num_tokens, options.empty))
        for index, stack in enumerate(stacks if taken else ()):
            compute = partial(descent.pieces, number, index, counted.of(number, index))
            for piece in pieces_through(checkpoint, number, index, compute, like.device):
                if piece.name in taken:
                    holders[piece.name].put(piece, stack)
        descent.done(number)
        if divided:
            give_back()
        for name in plan.levels.carried.keys() & {name for name, level in group.items if level == 0} & later & taken:
            holders[name].settle(descent.ids(name), dtype=options.gram_dtype)
        closed = sorted(group.names - later)
        if finished is not None:
            grams |= finished
            for name in closed:
                holders.pop(name, None)
            continue
        new = {*map(options.label, closed)} - grams.keys()
        for label in new:
            shape = (work.num_tokens, work.num_tokens)
            grams[label] = torch.empty(shape, dtype=options.gram_dtype, device=like.device)
        _add_all({name: holders.pop(name) for name in closed}, grams, options.label, new)
        checkpoint.write(stage_of(number), {label: grams[label] for label in {*map(options.label, closed)}}, {})
        for earlier in range(number + 1):  # pieces of what is still held stay
            if plan.groups[earlier].names.isdisjoint(later):
                checkpoint.drop(part_of(earlier))
    return grams


def _add_all(
    holders: dict[str, Holder], grams: Mapping[str, Tensor], label: Callable[[str], str], new: set[str]
) -> None:
    """Add the Gram of each to that of its label; of two that have a product in common, by one.

    Args:
        holders: By parameter; they are let go.
        grams: By label.
        label: Parameter → label.
        new: The labels of those with nothing in them yet, not even zeros.
    """
    workspace = Workspace()
    for name in list(holders):
        if name not in holders:
            continue
        taker = next((other for other, holder in holders.items() if holder.takes_along(holders[name])), None)
        if taker is None:
            over = _written_over([label(name)], grams, new)
            holders.pop(name).add_to(grams[label(name)], workspace, over=over)
        else:
            del holders[name]
            over = _written_over([label(taker), label(name)], grams, new)
            holders.pop(taker).add_to(grams[label(taker)], workspace, along=grams[label(name)], over=over)


def _written_over(labels: Sequence[str], grams: Mapping[str, Tensor], new: set[str]) -> bool:
    """Whether these Grams are two, or one, with nothing in them yet; else they have at least zeros then."""
    over = new.issuperset(labels) and len(set(labels)) == len(labels)
    if not over:
        for label in new.intersection(labels):
            grams[label].zero_()
    new.difference_update(labels)
    return over
