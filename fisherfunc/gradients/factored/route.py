"""The factored route: Grams of all parameters without forming their gradients, exact for every model.

A weight that enters through linear maps only has gradients Σ_s δ_{n,s} ⊗ a_s: collect.py pulls the output cotangents δ
back, contract.py turns them and the inputs a into Grams. Any other parameter, and one whose gradient is small next to
its factors, is formed in the same backward passes. The parameters are taken in groups whose factors fit the memory.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfunc.gradients.dense.route import dense_grams
from fisherfunc.gradients.factored._taps import factor_dtype
from fisherfunc.gradients.factored.collect import Unsettled, sequence_pieces
from fisherfunc.gradients.factored.contract import Holder
from fisherfunc.gradients.factored.loads import (
    Tally,
    backward_bytes,
    formed_cheaper,
    grouped,
    held_bytes,
    largest_group,
)
from fisherfunc.gradients.factored.structure import Structure, formed, probe, trace
from fisherfunc.gradients.memory import saved_bytes
from fisherfunc.gradients.rows import runs
from fisherfunc.gradients.self_check import NUM_TOKENS, gram_errors, wrong
from fisherfunc.gradients.workload import PassOptions, Workload

DEFAULT_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class FactoredPlan:
    """How a factored pass is done.

    Attributes:
        structure: What is exploited, and which parameters are formed and why.
        chunk_size: Tokens a batched backward pass.
        groups: The parameters of each pass over all tokens.
        slabbed: Parameters too large for the memory limit: the dense route takes them, slab by slab.
        peak_bytes: The estimated peak beyond the model itself.
        num_slabs: The passes of the dense route over the slabbed parameters.
    """

    structure: Structure
    chunk_size: int
    groups: tuple[frozenset[str], ...]
    slabbed: tuple[str, ...]
    peak_bytes: int
    num_slabs: int = 0


def plan_factored(work: Workload, options: PassOptions, *, structure: Structure | None = None) -> FactoredPlan:
    """Choose what is formed and what is passed together.

    Args:
        work: What to pass over.
        options: How.
        structure: What is known of the model; found by a probe on the longest sequence where None.
    """
    structure = structure or probe(work)
    like = next(iter(work.params.values()))
    num_sequences = len(torch.unique(work.tokens.sequence))
    tally = Tally(num_tokens=work.num_tokens, num_sequences=num_sequences, itemsize=factor_dtype(like.dtype).itemsize)
    traced = trace(work, work.longest, structure, ())
    cheaper = formed_cheaper(traced, structure, work.num_params, tally)
    if cheaper:
        structure = formed(structure, cheaper, "cheaper formed than factored")
        traced = trace(work, work.longest, structure, ())
    chunk_size = DEFAULT_CHUNK if options.chunk_size is None else options.chunk_size
    gram = work.num_tokens**2 * torch.empty((), dtype=options.gram_dtype).element_size()
    saved = saved_bytes(lambda: trace(work, work.longest, structure), beside=work.params.values())
    held = held_bytes(traced, structure, work.num_params, tally)
    fixed = len(work.params) * gram + backward_bytes(traced, structure, chunk_size, saved)
    groups, slabbed = grouped(held, options.limit(like.device) - fixed)
    return FactoredPlan(
        structure=structure,
        chunk_size=chunk_size,
        groups=groups,
        slabbed=tuple(slabbed),
        peak_bytes=fixed + largest_group(groups, held),
    )


class NotFactorable(Exception):  # noqa: N818 (no error: the dense route takes the model; the reason is recorded)
    """This route is not right for the model, or for the memory limit."""


def factored_grams(work: Workload, options: PassOptions) -> tuple[dict[str, Tensor], FactoredPlan]:
    """The Grams of the tokens, {name: (N, N)}; a row that is not finite spoils its row and column only.

    Cost: a backward pass from the output layer down, a token and group, at half the length for a causal model; and
    N² S d_out operations a weight of d_out outputs, for sequences of S places.

    Args:
        work: What to pass over.
        options: How.

    Returns:
        The Grams, and how they were computed.

    Raises:
        NotFactorable: If the model, or the memory limit, is one that this route is not for; with the reason.
        ValueError: If the memory limit is below what the dense route needs for the largest tensor.
    """
    plan = planned(work, options)
    while True:
        if not plan.groups:
            raise NotFactorable("the memory limit has no room for the factors of any tensor")
        try:
            grams = _grams(work, plan, options)
        except Unsettled as found:
            plan = planned(work, options, found.structure)
        except RuntimeError as error:  # a rule that cannot be batched, in a sequence other than the one probed
            raise NotFactorable(_first_line(error)) from error
        else:
            break
    if plan.slabbed:
        rest, plan = _slabbed(work, options, plan, grams)
        grams |= rest
    return {name: grams[name] for name in work.params}, plan


def planned(work: Workload, options: PassOptions, structure: Structure | None = None) -> FactoredPlan:
    """A plan whose Grams of a few tokens agree with ordinary backward passes.

    Where they do not, prefixes are given up first, then the factors of the weights that differ are: such a gradient
    is formed (one that a backward pass inside the model reads, say).

    Raises:
        NotFactorable: If that does not help, or the model cannot be passed over in this way.
    """
    while True:
        try:
            plan = plan_factored(work, options, structure=structure)
            bad = wrong_on_a_few(work, options, plan)
        except Unsettled as found:
            structure = found.structure
            continue
        except RuntimeError as error:  # what autograd raises for a rule that it cannot batch
            raise NotFactorable(_first_line(error)) from error
        if not bad:
            return plan
        if plan.structure.causal:
            structure = replace(plan.structure, causal=False)
        elif plan.structure.factored & set(bad):
            structure = formed(plan.structure, bad, "its factors do not give its gradient")
        else:
            raise NotFactorable(f"the gradient of {bad[0]!r} differs from that of ordinary backward passes")


def wrong_on_a_few(work: Workload, options: PassOptions, plan: FactoredPlan) -> list[str]:
    """The parameters whose Grams of a few tokens, each on a prefix of its own, differ from ordinary backward passes."""
    mine = (work.tokens.sequence == work.tokens.sequence.bincount().argmax()).nonzero().squeeze(-1)
    few = work.select(mine[torch.linspace(0, len(mine) - 1, min(NUM_TOKENS, len(mine))).long().unique()])
    trial = replace(plan, groups=(frozenset(work.params),), chunk_size=1)
    return wrong(gram_errors(_grams(few, trial, replace(options, progress=None)), few), work)


def _slabbed(
    work: Workload, options: PassOptions, plan: FactoredPlan, grams: dict[str, Tensor]
) -> tuple[dict[str, Tensor], FactoredPlan]:
    """The Grams of the tensors too large for a group, by the dense route in the memory that the other Grams leave."""
    large = {name: work.params[name] for name in plan.slabbed}
    others = replace(work.fn, params={**work.fn.params, **work.params})
    held = sum(gram.numel() * gram.element_size() for gram in grams.values())
    limit = options.limit(next(iter(large.values())).device) - held
    outcome = dense_grams(replace(work, fn=others, params=large), replace(options, memory_limit=limit))
    peak = max(plan.peak_bytes, outcome.plan.peak_bytes + held)
    return outcome.grams, replace(plan, peak_bytes=peak, num_slabs=len(outcome.plan.slabs))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _grams(work: Workload, plan: FactoredPlan, options: PassOptions) -> dict[str, Tensor]:
    grams: dict[str, Tensor] = {}
    total = work.num_tokens * len(plan.groups)
    for done, group in enumerate(plan.groups):
        holders = {name: Holder(work.num_tokens) for name in group}
        for first, last in runs(work.tokens.sequence):
            rows = slice(first, last)
            for piece in sequence_pieces(
                work, rows, structure=plan.structure, wanted=group, chunk_size=plan.chunk_size
            ):
                holders[piece.name].put(piece, rows)
            if options.progress is not None:
                options.progress(done * work.num_tokens + last, total)
        for name in group:
            grams[name] = holders.pop(name).gram(dtype=options.gram_dtype, device=work.params[name].device)
    return grams
