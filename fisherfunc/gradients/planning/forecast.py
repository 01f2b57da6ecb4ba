"""What a pass over some rows will do and take, before it is made: the plan of its route, and predicted seconds.

Seconds: the forward and backward passes from a timed sample of them, everything else from its operations at the rates
that the kernels themselves reach here (calibrate.py); beside them, what the plan itself took, as the run plans again.
"""

from dataclasses import replace
from time import perf_counter

import torch

from fisherfunc.gradients.autodiff import pullback
from fisherfunc.gradients.capture.structure import Structure, Unsettled
from fisherfunc.gradients.dense.route import plan_dense
from fisherfunc.gradients.dense.slabs import DensePlan
from fisherfunc.gradients.factored.estimate import Cost
from fisherfunc.gradients.factored.loads import tally_of
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factored.route import NotFactorable, planned, slab_pass, with_slabs
from fisherfunc.gradients.factors.pieces import factor_dtype
from fisherfunc.gradients.planning.calibrate import (
    Bench,
    entry_rate,
    least_seconds,
    point_rate,
    product_rate,
    row_rate,
    strip_rate,
    tile_rate,
)
from fisherfunc.gradients.planning.run_plan import RunPlan, dense_run, factored_run, timed
from fisherfunc.gradients.planning.sample import sampled_seconds
from fisherfunc.gradients.rows.gradient_rows import gradient_chunks, losses_of
from fisherfunc.gradients.rows.subsample import EVERY, Coordinates
from fisherfunc.gradients.rows.workload import PassOptions, Workload


def forecast(
    work: Workload, options: PassOptions, *, route: str, coordinates: Coordinates = EVERY, calibrate: bool = True
) -> RunPlan:
    """The plan of a pass.

    Cost: a probe and a check on a few rows, as at the start of the pass itself; and about a second of calibration.

    Args:
        work: What would be passed over.
        options: How.
        route: "factored" or "dense".
        coordinates: The columns to keep; the dense route alone can do that.
        calibrate: Whether to predict seconds.

    Raises:
        ValueError: If the memory limit is below the smallest chunk.
    """
    begin = perf_counter()
    limit = options.limit(next(iter(work.params.values())).device)
    options = replace(options, memory_limit=limit, progress=None)
    reason, structure = "asked for" if route == "dense" else "coordinates are sampled", None
    while route == "factored" and not coordinates.index:
        try:
            plan = _factored(work, options, structure)
            run = factored_run(plan, work, memory_limit=limit)
            spent = perf_counter() - begin
            return _factored_seconds(run, plan, work, options, spent) if calibrate else run
        except Unsettled as found:  # seen in the timed sample, as the pass itself would see it
            structure = found.structure
        except NotFactorable as unfit:
            reason = str(unfit)
            break
    dense = plan_dense(work, options, coordinates=coordinates)
    run = dense_run(dense, work, reason=reason, memory_limit=limit)
    spent = perf_counter() - begin
    return _dense_seconds(run, dense, work, options, spent) if calibrate else run


def _factored(work: Workload, options: PassOptions, structure: Structure | None) -> FactoredPlan:
    plan = planned(work, options, structure, try_short=True)
    if not plan.groups:
        raise NotFactorable("the memory limit has no room for the factors of any tensor")
    return with_slabs(work, options, plan)


def _bench(work: Workload, options: PassOptions) -> Bench:
    like = next(iter(work.params.values()))
    dtype = factor_dtype(like.dtype)
    return Bench(device=like.device, dtype=dtype, gram_dtype=options.gram_dtype, num_rows=work.num_tokens)


def _factored_seconds(run: RunPlan, plan: FactoredPlan, work: Workload, options: PassOptions, spent: float) -> RunPlan:
    bench = _bench(work, options)
    rates = {"product": product_rate(bench), "entries": entry_rate(bench)}
    passes = sampled_seconds(work, plan, rates["product"])
    rates |= _rates(plan, bench, work)
    contraction = sum(cost.contraction / rates[_kind(cost)] for cost in plan.costs.values() if cost.route != "slabs")
    contraction += len(plan.costs) * work.num_tokens**2 / rates["entries"]
    if plan.slabs is not None:
        large, how = slab_pass(work, options, plan, 0)
        more = _dense_parts(plan.slabs, large, how, bench)
        passes, contraction = passes + more[0], contraction + more[1]
    return timed(replace(run, rates=rates), preparation=spent, passes=passes, contraction=contraction)


def _kind(cost: Cost) -> str:
    if "pairwise" in cost.route:
        return "strips"
    return "points" if cost.route.startswith(("points", "output layer")) else "rows"


def _rates(plan: FactoredPlan, bench: Bench, work: Workload) -> dict[str, float]:
    """The rate of each kind of contraction, on the shape of the parameter that has most to do."""
    tally = tally_of(work)
    found: dict[str, float] = {}
    for kind in ("strips", "points", "rows"):
        some = [cost for cost in plan.costs.values() if _kind(cost) == kind and cost.route != "slabs"]
        if not some:
            continue
        cost = max(some, key=lambda c: c.contraction)
        others = max(1, cost.num_params // max(cost.features, 1))
        if kind == "strips":
            found[kind] = strip_rate(
                bench,
                places=cost.places,
                features=cost.features,
                others=others,
                per_sequence=tally.per_sequence,
                causal=plan.structure.causal,
            )
        elif kind == "points":
            found[kind] = point_rate(bench, cost.features, others)
        else:
            found[kind] = row_rate(bench, cost.num_params)
    return found


def _dense_seconds(run: RunPlan, plan: DensePlan, work: Workload, options: PassOptions, spent: float) -> RunPlan:
    bench = _bench(work, options)
    passes, contraction = _dense_parts(plan, work, options, bench)
    contraction += len(work.params) * work.num_tokens**2 / entry_rate(bench)
    return timed(run, preparation=spent, passes=passes, contraction=contraction)


def _dense_parts(plan: DensePlan, work: Workload, options: PassOptions, bench: Bench) -> tuple[float, float]:
    """Seconds of the passes, from a chunk of the first slab's parameters, and of the Grams."""
    some = {columns.name: work.params[columns.name] for columns in plan.slabs[0]}
    losses = losses_of(work.fn, work.params, work.sequences, work.loss)
    count = int((work.tokens.sequence == work.tokens.sequence[0]).sum())
    first = work.select(torch.arange(min(plan.chunk_size, count), device="cpu"))
    method = pullback.choose(losses(int(first.tokens.sequence[0])), some)

    def chunk() -> None:
        for _ in gradient_chunks(losses, some, first.tokens, method=method, chunk_size=plan.chunk_size):
            pass

    each = least_seconds(chunk, bench.device)
    passes = len(plan.slabs) * each * work.num_tokens / first.num_tokens
    columns = sum(columns.width for slab in plan.slabs for columns in slab)
    widest = max(columns.width for slab in plan.slabs for columns in slab)
    return passes, 2.0 * work.num_tokens**2 * columns / tile_rate(bench, widest)
