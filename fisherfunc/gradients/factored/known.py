"""What a model gives at its cuts, kept for all passes: what lies below a cut is not run again for what is above it.

One forward pass over each stack gives the values. Every pass that goes on from one of them must come, where it ends, to
what this one came to: so whatever bypasses a cut is seen.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.factored.calls import Call
from fisherfunc.gradients.factored.cuts import Leg, Levels, strays
from fisherfunc.gradients.factored.pieces import inputs_by_place, is_lookup
from fisherfunc.gradients.factored.recording import Use
from fisherfunc.gradients.factored.separate import sequences_apart
from fisherfunc.gradients.factored.structure import Structure, Traced, Unsettled, close, settled, trace
from fisherfunc.gradients.refusals import REFUSALS
from fisherfunc.gradients.stacks import Stack
from fisherfunc.gradients.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Known:
    """Of one stack of sequences.

    Attributes:
        losses: Its losses.
        values: {call that makes a cut: the cut}.
        ids: {parameter that is looked up: the ids, in ascending order}.
    """

    losses: Tensor
    values: Mapping[Call, Tensor]
    ids: Mapping[str, Tensor]

    def at_floor(self, leg: Leg) -> Tensor | None:
        """What a pass on this leg goes on from; None where it runs the whole model."""
        return None if leg.floor is None else self.values[leg.floor]

    def agrees(self, traced: Traced, leg: Leg) -> bool:
        """Whether a pass on this leg came to the same values where it ended."""
        expected = self.losses if leg.start is None else self.values[leg.start]
        value = traced.losses if traced.recording.end is None else traced.recording.end
        return value.shape == expected.shape and close(value.detach(), expected)


def known_of(
    work: Workload, stack: Stack, structure: Structure, levels: Levels, *, leaves: Iterable[str], calls: frozenset[Call]
) -> Known:
    """Run a stack from end to end, hold it against the structure, and keep its losses and the values of some cuts.

    Raises:
        Unsettled: If the structure does not hold for these sequences.
    """
    traced = settled_pass(work, stack, structure, leaves=leaves, values=calls)
    if any(_bypassed(call, traced, levels) for call in calls):
        raise Unsettled(replace(structure, cuttable=False))
    values = {call: tensor.detach() for call, (tensor, _) in traced.recording.values.items()}
    uses = [use for use in traced.recording.uses if is_lookup(use)]
    ids = {name: torch.cat([_ids(use) for use in uses if use.name == name]).unique() for name in {u.name for u in uses}}
    return Known(losses=traced.losses.detach(), values=values, ids=ids)


def _bypassed(call: Call, traced: Traced, levels: Levels) -> bool:
    """Whether a cut was not made, or changed later, or the losses lead to what is below it past it."""
    cut, version = traced.recording.values.get(call, (None, 0))
    above = {key for key, level in levels.of.items() if level <= levels.cuts.index(call)}
    return (
        cut is None
        or cut._version != version
        or bool(strays(traced.losses, cut, traced.recording.uses, traced.leaves, above))
    )


def _ids(use: Use) -> Tensor:
    ids = inputs_by_place(use, 1).flatten()
    return ids[ids >= 0]  # those of padding have no gradient


def settled_pass(work: Workload, stack: Stack, structure: Structure, **how: Any) -> Traced:
    """A pass over a whole stack, held against the structure, and its sequences against each other.

    Args:
        work: What is passed over.
        stack: Of its sequences.
        structure: What is exploited.
        how: As `trace` takes it.

    Raises:
        Unsettled: If parameters are used in another way, one sequence reaches another, or they do not run together.
    """
    mixed = Unsettled(replace(structure, stacked=False))
    try:
        whole = trace(work, stack.batch, structure, width=stack.width, **how)
        changed = settled(structure, whole.recording)
        others = (changed.factored, changed.head) != (structure.factored, structure.head)
        if stack.width > 1 and (others or len(whole.losses) != stack.width):  # another model where it runs more
            raise mixed
        if changed != structure:
            raise Unsettled(changed)
        if stack.width > 1 and not sequences_apart(work, stack, structure, whole):
            raise mixed
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        if stack.width == 1:
            raise
        raise mixed from error
    return whole
