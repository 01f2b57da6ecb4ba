"""A trial of a plan: Grams of a few tokens, held against ordinary backward passes before any long pass begins.

It does what the pass will do: sequences of one stack run together, chunks have slots of different lengths and run on
prefixes, cuts and shortcuts are taken.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fisherfunc.gradients.factored.cuts import Levels
from fisherfunc.gradients.factored.groups import everything
from fisherfunc.gradients.factored.loads import check_room
from fisherfunc.gradients.factored.passes import passed_grams
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.self_check import gram_errors, wrong
from fisherfunc.gradients.stacks import around_fullest
from fisherfunc.gradients.workload import PassOptions, Workload

OTHERS = 1
OTHERS_FROM_CUTS = 4
"""Tokens of other sequences, at random: one that does not make a cut, as experts may, is seen before a long pass."""


def wrong_on_a_few(work: Workload, options: PassOptions, plan: FactoredPlan) -> list[str]:
    """The parameters whose Grams of a few tokens differ from those of ordinary backward passes.

    Cost: a pass of two slots and some of one, and an ordinary forward and backward pass a sequence of the tokens.

    Args:
        work: What will be passed over.
        options: How.
        plan: How, and what is exploited.
    """
    few = work.select(_few(work, plan))
    trial = replace(plan, chunk_size=min(2, plan.chunk_size))
    if plan.slabbed or not plan.levels.cuts:
        trial = replace(trial, groups=(everything(work.params),), levels=Levels())
    grams = passed_grams(few, trial, replace(options, progress=None, labels=None))
    room = check_room(options.limit(few.tokens.sequence.device))
    return wrong(gram_errors(grams, few, room=room), work)


def _few(work: Workload, plan: FactoredPlan) -> Tensor:
    """Two rows of the fullest sequence, inside it, of a neighbour in its stack too, and some of others."""
    sequence = work.tokens.sequence
    fullest, members = around_fullest(work.sequences, work.tokens, plan.width)
    pair = sorted({fullest, members[0] if fullest == members[-1] else members[-1]})
    rows = [(sequence == member).nonzero().squeeze(-1) for member in pair]
    chosen = [mine[[len(mine) // 3, 2 * len(mine) // 3]] for mine in rows]
    others = (~torch.isin(sequence, torch.tensor(pair, device=sequence.device))).nonzero().squeeze(-1)
    picked = torch.randperm(len(others), generator=torch.Generator().manual_seed(0), device="cpu")
    picked = picked[: OTHERS_FROM_CUTS if plan.levels.cuts else OTHERS]
    return torch.cat([*chosen, others[picked.to(others.device)]]).unique()
