"""What a run and its plan have in common: options that make sense, the tokens, and what is known of the model."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fisherfunc.distributed.collectives import Everyone
from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.losses.asked import AnyLoss, token_loss_of
from fisherfunc.gradients.planning.made_for import MadeFor, facts_of, made_for
from fisherfunc.gradients.planning.run_plan import RunPlan
from fisherfunc.gradients.rows.subsample import EVERY, Coordinates, sample_coordinates
from fisherfunc.gradients.rows.targets import Targets, chosen
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.gradients.survey.prepare import Prepared, check_options, prepared, pulled
from fisherfunc.partitioning import labels_of, partition
from fisherfunc.records.axes import Batch, Params, Progress

SAME = "give every rank the same model, options and whole batch, which is dealt to them here"


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is known when a pass, or its plan, begins.

    Attributes:
        work: The rows, before tokens of a sequence are summed.
        ready: The tokens that they are of.
        options: How to pass.
        coordinates: The columns to keep.
        targets: The targets.
        made_for: What a plan of this is for; None where none was asked for.
    """

    work: Workload
    ready: Prepared
    options: PassOptions
    coordinates: Coordinates
    targets: Targets
    made_for: MadeFor | None


def started(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: AnyLoss,
    *,
    targets: Targets | None = None,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    route: str = "factored",
    chunk_size: int | None = None,
    memory_limit: int | None = None,
    gram_dtype: torch.dtype = torch.float64,
    blocks: Callable[[str], str] | None = None,
    max_coordinates: int | None = None,
    coordinate_blocks: Callable[[str], str] | None = None,
    drop_nonfinite: bool = False,
    self_check: bool = True,
    progress: Progress | None = None,
    plan: RunPlan | None = None,
    for_plan: bool = False,
    everyone: Everyone | None = None,
) -> Start:
    """Check the options, and find the tokens by a forward pass of each sequence, of ranks each its share.

    Args:
        fn: The model.
        params: What is differentiated by, from `fn.at`.
        batch: A batch, or a list of them.
        loss: The loss.
        targets: See `token_grams`, as all others but the last.
        unit: What a row is.
        num_tokens: How many tokens, at most.
        seed: Of whatever is picked.
        route: "factored" or "dense".
        chunk_size: Tokens per batched backward pass.
        memory_limit: In bytes.
        gram_dtype: What Grams are accumulated in.
        blocks: Parameter name → the label of its Gram.
        max_coordinates: How many columns of a block are kept.
        coordinate_blocks: The blocks of these.
        drop_nonfinite: Whether to leave out tokens that are not finite.
        self_check: Whether the Grams will be checked.
        progress: To be called.
        plan: One that was made for a batch of the same shapes.
        for_plan: Whether a plan is to be made of it.
        everyone: The ranks that start together; this process alone where None.

    Raises:
        PlanMismatchError: If the plan was made for something else; it names what.
        ValueError: As `token_grams`, also where ranks differ in what the search for tokens depends on.
    """
    check_options(num_tokens, chunk_size, memory_limit, route, unit)
    targets, coordinates = chosen(targets, unit=unit), EVERY
    if max_coordinates is not None:
        parts = partition(params, coordinate_blocks or blocks or (lambda name: name))
        sizes = {name: p.numel() for name, p in params.items()}
        coordinates = sample_coordinates(sizes, parts, max_coordinates=max_coordinates, seed=seed)
    options = PassOptions(
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        gram_dtype=gram_dtype,
        labels=None if blocks is None else labels_of(partition(params, blocks)),
        checked=self_check,
        progress=progress,
        plan=None if plan is None else plan.of_route,
    )
    data = pulled(batch, num_tokens, lambda first: token_loss_of(loss, first))
    batch = data.batches
    if everyone is not None:
        asked = {"num_tokens": num_tokens, "seed": seed, "unit": unit, "drop_nonfinite": drop_nonfinite}
        everyone.check_alike({**asked, "self_check": self_check, "batch": split(batch).hash()}, SAME)
    loss = token_loss_of(loss, batch)
    known, facts = _known(plan), {}
    if known is not None or for_plan:
        how = {"targets": targets.name, "unit": unit, "num_tokens": num_tokens, "seed": int(seed)}
        how |= {"route": route, "drop_nonfinite": drop_nonfinite}
        facts = facts_of(fn, params, split(batch), loss, options, coordinates, **how)
    if known is not None:
        known.check(facts)
    seen = None if known is None else known.seen
    found = prepared(
        fn,
        params,
        batch,
        loss,
        num_tokens=num_tokens,
        seed=seed,
        drop_nonfinite=drop_nonfinite,
        seen=seen,
        checked=self_check and num_tokens is None,  # sequences without a row are in no company of the check
        everyone=everyone,
    )
    if known is not None:
        known.check_tokens(found.work.tokens)
    ready = replace(found, data=data.facts)
    return Start(
        work=targets.rows(ready.work, options),
        ready=ready,
        options=options,
        coordinates=coordinates,
        targets=targets,
        made_for=made_for(facts, ready) if for_plan else None,
    )


def _known(plan: RunPlan | None) -> MadeFor | None:
    if plan is not None and plan.made_for is None:
        raise ValueError("plan= expected one that ff.plan made, got that of a run which is done; call ff.plan")
    return None if plan is None else plan.made_for
