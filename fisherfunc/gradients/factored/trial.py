"""A trial of a plan: Grams of a few tokens are held against ordinary backward passes before a long pass begins.

It does what the pass will do: sequences of one stack run together, chunks have slots of different lengths and run on
prefixes and segments are taken. A short pass is its own trial, as it is checked when it is done.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fisherfunc.gradients.capture.segments import WHOLE
from fisherfunc.gradients.checks.certificate import Certificate, certify
from fisherfunc.gradients.factored.groups import everything
from fisherfunc.gradients.factored.passes import passed_grams
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.rows.stacks import around_fullest, neighbours
from fisherfunc.gradients.rows.workload import PassOptions, Workload

OTHERS = 1
OTHERS_DIVIDED = 4
"""Tokens of other sequences, at random: one that calls other modules, as experts may be, is seen before a long pass."""


def tried(work: Workload, options: PassOptions, plan: FactoredPlan, *, try_short: bool) -> Certificate | None:
    """Hold the Grams of a few tokens against ordinary backward passes; None where the pass itself is as short.

    A pass that nobody checks when it is done is tried in any case.

    Cost: a pass of two slots and some of one, and an ordinary forward and backward pass of their sequences.

    Args:
        work: What will be passed over.
        options: How.
        plan: How, and what is exploited.
        try_short: Whether to try a pass that is as short as well.
    """
    if is_its_own_trial(work, options, plan) and not try_short:
        return None
    few = work.select(_few(work, plan))
    trial = replace(plan, chunk_size=min(2, plan.chunk_size))
    if plan.slabbed:
        trial = replace(trial, groups=(everything(work.params),), segments=WHOLE)
    grams = passed_grams(few, trial, replace(options, progress=None, labels=None))
    return certify(grams, few, limit=options.limit(few.tokens.sequence.device), stack_width=plan.width)


def is_its_own_trial(work: Workload, options: PassOptions, plan: FactoredPlan) -> bool:
    """Return whether a pass is as short as its trial would be, and is checked when it is done."""
    members = work.tokens.sequence.unique_consecutive().tolist()
    one_stack = sum(1 for _ in neighbours(members, work.sequences, plan.width)) == 1
    return options.checked and one_stack and plan.num_passes == plan.num_segments


def _few(work: Workload, plan: FactoredPlan) -> Tensor:
    """Two rows of the fullest sequence, inside it, of a neighbour in its stack too, and some of others."""
    sequence = work.tokens.sequence
    fullest, members = around_fullest(work.sequences, work.tokens, plan.width)
    pair = sorted({fullest, members[0] if fullest == members[-1] else members[-1]})
    rows = [(sequence == member).nonzero().squeeze(-1) for member in pair]
    chosen = [mine[[len(mine) // 3, 2 * len(mine) // 3]] for mine in rows]
    others = (~torch.isin(sequence, torch.tensor(pair, device=sequence.device))).nonzero().squeeze(-1)
    picked = torch.randperm(len(others), generator=torch.Generator().manual_seed(0), device="cpu")
    picked = picked[: OTHERS_DIVIDED if plan.segments.ends else OTHERS]
    return torch.cat([*chosen, others[picked.to(others.device)]]).unique()
