"""The factored route: Grams of all parameters without forming their gradients, exact for every model.

A weight that enters through linear maps only has gradients Σ_s δ_{n,s} ⊗ a_s: collect.py pulls the output cotangents δ
back, contract.py turns them and the inputs a into Grams. Any other parameter, and one whose gradient is small next to
its factors, is formed in the same backward passes. The parameters are taken in groups whose factors fit the memory,
each from a cut of the model on where there is one (passes.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fisherfunc.gradients.alone import ALONE, Alone
from fisherfunc.gradients.capture.structure import Structure, Unsettled, refusing
from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint
from fisherfunc.gradients.checks.certificate import refused_then
from fisherfunc.gradients.dense.route import dense_grams, plan_dense
from fisherfunc.gradients.factored.passes import passed_grams
from fisherfunc.gradients.factored.plan import FactoredPlan, plan_factored
from fisherfunc.gradients.factored.trial import is_its_own_trial, tried
from fisherfunc.gradients.rows.workload import PassOptions, Workload


class NotFactorable(Exception):  # noqa: N818 (no error: the dense route takes the model; the reason is recorded)
    """This route is not right for the model, or for the memory limit."""


def factored_grams(
    work: Workload, options: PassOptions, checkpoint: Checkpoint = NOWHERE, company: Alone = ALONE
) -> tuple[dict[str, Tensor], FactoredPlan]:
    """The Grams of the tokens, {name: (N, N)}; a row that is not finite spoils its row and column only.

    Cost: a backward pass from the output layer down, a token and group, at half the length for a causal model; and
    N² S d_out operations a weight of d_out outputs, for sequences of S places.

    Args:
        work: What to pass over.
        options: How.
        checkpoint: Where to keep what is done, and the plan of a pass to go on with.
        company: Who else passes over rows of their own.

    Returns:
        The Grams, by parameter or by the labels of the options, and how they were computed.

    Raises:
        NotFactorable: If the model, or the memory limit, is one that this route is not for; with the reason.
        ValueError: If the memory limit is below what the dense route needs for the largest tensor.
    """
    plan = next((one for one in (checkpoint.plan, options.plan) if isinstance(one, FactoredPlan)), None)
    structure: Structure | None = None
    while True:
        plan = company.agreed(partial(_fitting, plan, work, options, structure))
        checkpoint.begin(plan)
        try:
            grams = passed_grams(work, plan, options, checkpoint, company)
            break
        except Unsettled as found:
            plan, structure = None, found.structure
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a rule that cannot be batched, in a sequence other than the one probed
            raise NotFactorable(_first_line(error)) from error
    # A product of factors may overflow where the gradient does not, and the check leaves out rows that are not finite.
    rows = torch.stack([company.own(gram).diagonal() for gram in grams.values()])
    untried = work.num_tokens > 0 and is_its_own_trial(work, options, plan)
    if company.any_of(untried and not bool(rows.isfinite().all())):
        raise NotFactorable("a row is not finite")
    if plan.slabbed:
        plan = _add_slabbed(work, options, plan, grams, checkpoint.under("slabbed"), company)
    return {label: grams[label] for label in dict.fromkeys(map(options.label, work.params))}, plan


def _fitting(
    plan: FactoredPlan | None, work: Workload, options: PassOptions, structure: Structure | None
) -> FactoredPlan:
    """The plan that there is, as another amount of memory may be free by now, or a new one; one that fits."""
    plan = plan or planned(work, options, structure)
    if not plan.groups:
        raise NotFactorable("the memory limit has no room for the factors of any tensor")
    with_slabs(work, options, plan)  # what does not fit beside the Grams is said now, not after the passes
    return plan


def planned(
    work: Workload, options: PassOptions, structure: Structure | None = None, *, try_short: bool = False
) -> FactoredPlan:
    """Plan a pass, and try the plan on a few tokens where the pass is long.

    Where these fail, what they exploit is given up, then the factors of the weights that differ: such a gradient is
    formed (one that a backward pass inside the model reads, say).

    Args:
        work: What to pass over.
        options: How.
        structure: What is known of the model; found by a probe where None.
        try_short: Whether to try a short pass as well: nothing but its plan is asked for.

    Raises:
        NotFactorable: If that does not help, or the model cannot be passed over in this way.
    """
    refused: Mapping[str, str] | None = options.refused
    while True:
        try:
            plan = plan_factored(work, options, structure=structure)
            found = tried(work, options, plan, try_short=try_short) if options.tried else None
        except Unsettled as unsettled:
            structure = unsettled.structure
            continue
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what autograd raises for a rule that it cannot batch
            raise NotFactorable(_first_line(error)) from error
        if found is None or found.holds:
            return plan
        refused = refused_then(refused, plan.exploited, found, work.params)
        if refused is None:
            raise NotFactorable(found.told())
        structure = refusing(plan.structure, refused)


def _add_slabbed(
    work: Workload,
    options: PassOptions,
    plan: FactoredPlan,
    grams: dict[str, Tensor],
    checkpoint: Checkpoint,
    company: Alone,
) -> FactoredPlan:
    """Add the Grams of tensors too large for a group, by the dense route in the memory that the other Grams leave."""
    held = sum(company.own(gram).numel() * gram.element_size() for gram in grams.values())
    outcome = dense_grams(*slab_pass(work, options, plan, held), checkpoint=checkpoint, company=company)
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
