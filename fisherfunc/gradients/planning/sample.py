"""A timed sample of a factored pass: the fullest stack, with the slots of two chunks, all parameters.

From the time to the end of the first chunk and to that of the second follow what a stack costs before its chunks (the
whole forward pass, the output layer, the checks) and what a batched backward pass costs; the rest is counting. The
slots are fewer than the plan's where a chunk would take longer than the budget.
"""

from collections.abc import Sequence

import torch

from fisherfunc.gradients.factored.collect import stack_pieces
from fisherfunc.gradients.factored.estimate import Spans, spans_of
from fisherfunc.gradients.factored.groups import Taken, everything
from fisherfunc.gradients.factored.loads import hardly_shorter
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factors.contract import Holder
from fisherfunc.gradients.factors.pieces import Piece
from fisherfunc.gradients.rows.stacks import Stack, around_fullest, stacks_of
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.runtime.clock import clock

BUDGET_S = 0.4
PIECES = 0.25
"""The share of a chunk's time that goes into what only the wanted parameters need."""
LATER = 0.15
"""What a stack costs a pass over a later segment, before its chunks, against the first: part of a forward pass."""


def sampled_seconds(work: Workload, plan: FactoredPlan, rate: float) -> float:
    """The predicted seconds of all forward and backward passes of a plan.

    Cost: a forward pass and one or two chunks of a stack of sequences.

    Args:
        work: What will be passed over.
        plan: How.
        rate: Operations a second of a matrix product, by which the sample is kept short.
    """
    _, members = around_fullest(work.sequences, work.tokens, plan.width)
    slots = _affordable(work, plan, len(members), rate)
    few = work.select(_rows(work, members, slots, plan.structure.causal))
    stack = next(iter(stacks_of(few.sequences, few.tokens, plan.width)))
    ends = _timed(few, stack, plan, slots)
    count = len(ends) - 1
    here = spans_of(few.tokens, slots, causal=plan.structure.causal)
    there = spans_of(work.tokens, plan.chunk_size, causal=plan.structure.causal)
    scale = len(work.tokens.sequence.unique()) / stack.width
    longest = int(work.tokens.position.max()) + 1
    if count < 2:  # a single chunk: it all goes with the number of stacks and slots
        slots_ratio = (there.backward / here.backward) / scale
        return len(plan.groups) * ends[-1] * scale * max(1.0, slots_ratio)
    middle, end = _reaches(few, slots, longest) if plan.structure.causal else (longest, longest)
    one = (ends[2] - ends[1]) / _chunk_units(end, longest, slots, causal=plan.structure.causal)
    before = max(0.0, ends[1] - one * _chunk_units(middle, longest, slots, causal=plan.structure.causal))
    chunks = one / stack.width * _units(work, there, causal=plan.structure.causal)
    again = LATER if plan.num_segments > 1 else 1.0
    return (1 + again * (len(plan.groups) - 1)) * before * scale + _repeats(plan) * chunks


def _repeats(plan: FactoredPlan) -> float:
    """Every group repeats the batched passes from the output down to the lowest of its parameters.

    Over segments, the forward passes of prefixes alone: one for the backward passes of as many slots as a chunk has.
    """
    halfway = (len(plan.groups) + 1) / 2
    if plan.num_segments > 1:
        halfway = 1 + (halfway - 1) / (plan.chunk_size + 1)
    return PIECES + (1 - PIECES) * halfway


def _affordable(work: Workload, plan: FactoredPlan, width: int, rate: float) -> int:
    operations = sum(cost.backward for cost in plan.costs.values()) / work.num_tokens * width
    return max(1, min(plan.chunk_size, int(BUDGET_S / 2 * rate / max(operations, 1.0))))


def _rows(work: Workload, members: Sequence[int], slots: int, causal: bool) -> torch.Tensor:
    """The rows of the chunk in the middle and of the last one, for each member; the first two where all are alike."""
    found = []
    for member in members:
        mine = (work.tokens.sequence == member).nonzero().squeeze(-1)
        if len(mine) <= 2 * slots:
            found.append(mine)
        elif causal:
            middle = len(mine) // 2
            found += [mine[max(0, middle - slots) : middle], mine[-slots:]]
        else:
            found.append(mine[: 2 * slots])
    return torch.cat(found)


def _timed(few: Workload, stack: Stack, plan: FactoredPlan, slots: int) -> list[float]:
    """Seconds from the start to the end of each chunk, from 0."""
    ends = [0.0]
    holders = {name: Holder(few.num_tokens) for name in few.params}
    device = few.tokens.sequence.device
    begin = clock(device)
    pieces = stack_pieces(
        few,
        stack,
        Taken(group=everything(few.params)),
        structure=plan.structure,
        chunk_size=slots,
        passed=lambda count: ends.append(clock(device) - begin),
    )
    for piece in pieces:
        if isinstance(piece, Piece):
            holders[piece.name].put(piece, stack)
    return [*ends[:-1], clock(device) - begin]


def _reaches(few: Workload, slots: int, longest: int) -> tuple[int, int]:
    """How many places the first chunk of the sample runs on, and how many the second."""
    counts = few.tokens.sequence.bincount()
    mine = few.tokens.position[few.tokens.sequence == int(counts.argmax())]
    return int(mine[min(slots, len(mine)) - 1]) + 1, min(int(mine[-1]) + 1, longest)


def _chunk_units(reach: int, longest: int, slots: int, *, causal: bool) -> float:
    """A chunk in backward passes of whole sequences, the forward pass of its prefix with them."""
    return reach / longest * (slots + (causal and not hardly_shorter(reach, longest)))


def _units(work: Workload, spans: Spans, *, causal: bool) -> float:
    """Backward passes, and the forward passes of prefixes, in whole sequences."""
    prefixes = spans.forward - len(work.tokens.sequence.unique())
    return spans.backward + (prefixes if causal else 0.0)
