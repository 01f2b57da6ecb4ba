"""One pass over rows, by whichever route takes them, and what is said of it."""

from torch import Tensor

from fisherfunc.gradients.alone import ALONE, Alone
from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint
from fisherfunc.gradients.dense.route import dense_grams
from fisherfunc.gradients.dense.slabs import DensePlan
from fisherfunc.gradients.factored.route import NotFactorable, factored_grams
from fisherfunc.gradients.planning.run_plan import dense_run, factored_run
from fisherfunc.gradients.rows.subsample import EVERY, Coordinates
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.records.provenance import Provenance


def passed_by_route(
    work: Workload,
    options: PassOptions,
    route: str,
    coordinates: Coordinates = EVERY,
    checkpoint: Checkpoint = NOWHERE,
    note: str = "",
    company: Alone = ALONE,
) -> tuple[dict[str, Tensor], Provenance]:
    """Pass over rows by the route that is asked for, or by the dense one where the factored one is not for them.

    Args:
        work: The rows.
        options: How.
        route: "factored" or "dense".
        coordinates: The columns to keep; some of them are kept by the dense route alone.
        checkpoint: Where to keep what is done.
        note: Why the dense route, where nobody asked for it.
        company: Who else passes over rows of their own.

    Returns:
        The Grams, by parameter or label, and how they were computed.

    Raises:
        ValueError: If the memory limit is below the smallest chunk.
    """
    reason = note or ("asked for" if route == "dense" else "coordinates are sampled")
    limit = options.limit(next(iter(work.params.values())).device)
    begun = company.agreed(lambda: checkpoint.note if isinstance(checkpoint.plan, DensePlan) else None)
    if begun is not None:
        reason = begun
    elif route == "factored" and not coordinates.index and not isinstance(options.plan, DensePlan):
        try:
            grams, plan = factored_grams(work, options, checkpoint, company)
        except NotFactorable as unfit:
            reason = str(unfit)
        else:
            return grams, Provenance(
                route="factored",
                plan=factored_run(plan, work, memory_limit=limit).to_dict(),
                passes=plan.num_passes,
                segments=plan.num_segments,
                chunk_size=plan.chunk_size,
                predicted_peak_bytes=plan.peak_bytes,
                causal_prefixes=plan.structure.causal,
                output_layer=plan.structure.head[0] if plan.structure.head else None,
                stack_width=plan.width,
                exploited=list(plan.exploited),
                given_up=plan.structure.refused,
                formed_parameters=plan.formed,
                slabbed_parameters=list(plan.slabbed),
            )
    outcome = dense_grams(work, options, coordinates=coordinates, checkpoint=checkpoint, note=reason, company=company)
    return outcome.grams, Provenance(
        route="dense",
        route_reason=reason,
        plan=dense_run(outcome.plan, work, reason=reason, memory_limit=limit).to_dict(),
        passes=len(outcome.plan.slabs),
        chunk_size=outcome.plan.chunk_size,
        predicted_peak_bytes=outcome.plan.peak_bytes,
        method=outcome.method,
    )
