"""The factored route: Grams of all parameters without forming their gradients, exact for every model.

A weight that enters through linear maps only has gradients Σ_s δ_{n,s} ⊗ a_s: collect.py pulls the output cotangents δ
back, contract.py turns them and the inputs a into Grams. Any other parameter, and one whose gradient is small next to
its factors, is formed in the same backward passes. The parameters are taken in groups whose factors fit the memory,
each from a cut of the model on where there is one (passes.py).
"""

from dataclasses import replace

from torch import Tensor

from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint
from fisherfunc.gradients.dense.route import dense_grams, plan_dense
from fisherfunc.gradients.factored.passes import passed_grams
from fisherfunc.gradients.factored.plan import FactoredPlan, plan_factored
from fisherfunc.gradients.factored.structure import Structure, Unsettled, with_leaves
from fisherfunc.gradients.factored.trial import wrong_on_a_few
from fisherfunc.gradients.workload import PassOptions, Workload


class NotFactorable(Exception):  # noqa: N818 (no error: the dense route takes the model; the reason is recorded)
    """This route is not right for the model, or for the memory limit."""


def factored_grams(
    work: Workload, options: PassOptions, checkpoint: Checkpoint = NOWHERE
) -> tuple[dict[str, Tensor], FactoredPlan]:
    """The Grams of the tokens, {name: (N, N)}; a row that is not finite spoils its row and column only.

    Cost: a backward pass from the output layer down, a token and group, at half the length for a causal model; and
    N² S d_out operations a weight of d_out outputs, for sequences of S places.

    Args:
        work: What to pass over.
        options: How.
        checkpoint: Where to keep what is done, and the plan of a pass to go on with.

    Returns:
        The Grams, by parameter or by the labels of the options, and how they were computed.

    Raises:
        NotFactorable: If the model, or the memory limit, is one that this route is not for; with the reason.
        ValueError: If the memory limit is below what the dense route needs for the largest tensor.
    """
    plan = checkpoint.plan if isinstance(checkpoint.plan, FactoredPlan) else None
    plan = plan or planned(work, options)  # not made anew where there is one: another amount of memory may be free
    while True:
        if not plan.groups:
            raise NotFactorable("the memory limit has no room for the factors of any tensor")
        with_slabs(work, options, plan)  # what does not fit beside the Grams is said now, not after the passes
        checkpoint.begin(plan)
        try:
            grams = passed_grams(work, plan, options, checkpoint)
            break
        except Unsettled as found:
            structure = found.structure
        except RuntimeError as error:  # a rule that cannot be batched, in a sequence other than the one probed
            raise NotFactorable(_first_line(error)) from error
        plan = planned(work, options, structure)  # here, where the exception no longer keeps what had been computed
    if plan.slabbed:
        plan = _add_slabbed(work, options, plan, grams, checkpoint.under("slabbed"))
    return {label: grams[label] for label in dict.fromkeys(map(options.label, work.params))}, plan


def planned(work: Workload, options: PassOptions, structure: Structure | None = None) -> FactoredPlan:
    """A plan whose Grams of a few tokens agree with ordinary backward passes.

    Where they do not, cuts are given up first, then shortcuts and stacks, then prefixes, then the factors of the
    weights that differ: such a gradient is formed (one that a backward pass inside the model reads, say).

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
        if plan.levels.cuts:
            structure = replace(plan.structure, cuttable=False)
        elif plan.structure.shortcuts or plan.structure.stacked:
            structure = replace(plan.structure, shortcuts={}, stacked=False)
        elif plan.structure.causal:
            structure = replace(plan.structure, causal=False)
        elif plan.structure.factored & set(bad):
            structure = with_leaves(plan.structure, bad, "its factors do not give its gradient")
        else:
            raise NotFactorable(f"the gradient of {bad[0]!r} differs from that of ordinary backward passes")


def _add_slabbed(
    work: Workload, options: PassOptions, plan: FactoredPlan, grams: dict[str, Tensor], checkpoint: Checkpoint
) -> FactoredPlan:
    """Add the Grams of tensors too large for a group, by the dense route in the memory that the other Grams leave."""
    held = sum(gram.numel() * gram.element_size() for gram in grams.values())
    outcome = dense_grams(*slab_pass(work, options, plan, held), checkpoint=checkpoint)
    for label, gram in outcome.grams.items():
        grams[label] = grams[label] + gram if label in grams else gram
    peak = max(plan.peak_bytes, outcome.plan.peak_bytes + held)
    return replace(plan, peak_bytes=peak, slabs=outcome.plan)


def with_slabs(work: Workload, options: PassOptions, plan: FactoredPlan) -> FactoredPlan:
    """The plan with the passes of the dense route over the tensors too large for a group.

    Raises:
        ValueError: If the memory that the other Grams leave is below what the largest of them needs.
    """
    if not plan.slabbed:
        return plan
    labels = {options.label(name) for group in plan.groups for name in group.names}
    held = len(labels) * work.num_tokens**2 * options.gram_dtype.itemsize
    slabs = plan_dense(*slab_pass(work, options, plan, held))
    return replace(plan, slabs=slabs, peak_bytes=max(plan.peak_bytes, slabs.peak_bytes + held))


def slab_pass(work: Workload, options: PassOptions, plan: FactoredPlan, held: int) -> tuple[Workload, PassOptions]:
    """What the dense route is given of a plan: the tensors too large for a group, in the memory that is not held."""
    large = {name: work.params[name] for name in plan.slabbed}
    others = replace(work.fn, params={**work.fn.params, **work.params})
    limit = options.limit(next(iter(large.values())).device) - held
    return replace(work, fn=others, params=large), replace(options, memory_limit=limit)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
