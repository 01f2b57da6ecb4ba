"""`token_grams`: the one expensive pass. Everything else is algebra on what it returns."""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherfunc.distributed.collectives import Everyone, Ranks
from fisherfunc.distributed.entering import with_ranks
from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.autodiff.nature import coarsest
from fisherfunc.gradients.by_route import passed_by_route
from fisherfunc.gradients.checkpoint import NOWHERE, folder_of, opened
from fisherfunc.gradients.checks.certificate import certified
from fisherfunc.gradients.checks.round_off import RoundOff, round_off
from fisherfunc.gradients.checks.sound import SoundPass, named, sound_pass
from fisherfunc.gradients.fingerprint import fingerprint
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.gradients.planning.outcome import watched
from fisherfunc.gradients.planning.room import check_room
from fisherfunc.gradients.planning.run_plan import RunPlan
from fisherfunc.gradients.provenance import provenance_of_rows
from fisherfunc.gradients.ranks.certificate import certify_over_ranks
from fisherfunc.gradients.ranks.passes import facts_of_ranks, passed_over_ranks
from fisherfunc.gradients.ranks.ring import common_limit
from fisherfunc.gradients.rows.targets import Targets
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.gradients.start import started
from fisherfunc.linalg.grams.divided import AnyGram, DividedGrams, whole
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.partitioning import rule_name
from fisherfunc.population.clusters import coded
from fisherfunc.records.axes import Batch, Params, Progress
from fisherfunc.records.plain import dtype_name
from fisherfunc.records.provenance import Provenance
from fisherfunc.runtime.precision import full_precision


@with_ranks(after=whole)
@full_precision()
@torch.inference_mode(mode=False)
def token_grams(
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
    checkpoint: str | os.PathLike[str] | None = None,
    plan: RunPlan | None = None,
    clusters: Iterable[Hashable] | Tensor | None = None,
    ranks: Ranks | Everyone | None = None,
    progress: Progress | None = None,
) -> TokenGrams:
    """The Gram matrix K_p = G_p G_pᵀ of every parameter tensor: unnormalised, exact.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batch: A batch, a list of them, or what gives them one after the other, as of `fisher_spectrum`.
        loss: The token loss: one of `ff.losses`, a loss of torch, or a function (output, batch) → losses.
        targets: Which targets gradients are of, and so which Fisher F is: `ff.targets.observed()`, also where None,
            `sampled(num_draws)`, `all_classes()`. Others than the observed ones give a token several rows.
        unit: What a row is: "token", or "sequence": the sum over its tokens, in one backward pass a sequence.
        num_tokens: At most this many tokens, picked by seed; all of them where None.
        seed: Of whatever is picked.
        route: "factored": from output cotangents and inputs of linear maps; or "dense": gradients are formed, one slab
            of columns at a time. Both are exact; coordinates are sampled by the dense one.
        chunk_size: Tokens a batched backward pass; the result does not depend on it beyond round-off.
        memory_limit: In bytes, beyond the model; half of what is free where None.
        gram_dtype: What Grams are accumulated in.
        blocks: Parameter name → label: one Gram a label, the sum of those of its parameters, so that memory is N² times
            the number of blocks; a Gram a parameter where None. Finer blocks then take another pass.
        max_coordinates: Approximate: keep at most this many columns a block (see subsample.py).
        coordinate_blocks: The blocks of `max_coordinates`; those of `blocks` where None, or else each parameter is one.
        drop_nonfinite: Whether to leave out tokens with a loss or gradient that is not finite, and count them.
        self_check: Whether to hold the Grams against one ordinary backward pass of the batch (see certificate.py), and
            to measure their round-off by up to eight backward passes in float64 (see round_off.py). Where the check of
            the factored route fails, the pass is done again without what it exploits, without the factors that differ,
            and then by the dense route; the metadata say so. Without a check the pass is tried on a few tokens, and
            what other sequences do otherwise is not seen.
        checkpoint: A folder in which the pass keeps what it has done: the same call goes on from there, to the same
            bits, and after the end takes the Grams from there. Each run needs a folder of its own; nothing deletes it.
        plan: From `ff.plan` with the same options, for this model or one of the same shapes, and a batch of the same
            shapes: nothing is discovered again, and the check at the end is the same.
        clusters: A label per sequence of the batch, where sequences are not independent of each other (the windows of a
            document, answers to a prompt): what `ff.population` and `ff.statistics` then take in place of sequences.
        ranks: From `ff.distributed.ranks()`: the processes that share the pass, each of which makes this same call with
            the whole batch, and gets the same whole Grams; `fisher_spectrum` gathers none of them. `metadata["ranks"]`
            says what each had to do. Grams agree with those of one process to round-off.
        progress: Called as `progress(done, total)`, in backward passes of one token; of ranks, of this one's.

    Returns:
        One Gram a parameter (or a block), and which unit each row is.

    Raises:
        ValueError: If no token is valid, an option is out of range, the memory limit is below the smallest chunk, a
            loss or gradient is not finite (the error names sequence, position and parameter), the checkpoint is of
            another run (it says what differs) or another number of ranks, the targets are not for this loss, this unit
            or this memory limit, the samples of a batch depend on each other, clusters are not one per sequence, the
            plan was made for something else (a `PlanMismatchError`, it names what), or the self-check fails (it names
            block and sequences).
            Where ranks differ in anything that they must have in common, it says what.
        MemoryError: If the Grams alone take more than the memory that is free.
        OSError: If the checkpoint cannot be written.
        ff.distributed.RanksError: If another rank fails, is gone or hangs; it names which, and why.
    """
    everyone = ranks if isinstance(ranks, Everyone) else None  # what `with_ranks` makes of them
    params = fn.at(params)
    outcome = watched(next(iter(params.values())).device)
    start = started(
        fn,
        params,
        batch,
        loss,
        targets=targets,
        unit=unit,
        num_tokens=num_tokens,
        seed=seed,
        route=route,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        gram_dtype=gram_dtype,
        blocks=blocks,
        max_coordinates=max_coordinates,
        coordinate_blocks=coordinate_blocks,
        drop_nonfinite=drop_nonfinite,
        self_check=self_check,
        progress=progress,
        plan=plan,
        everyone=everyone,
    )
    work, ready, options, coordinates = start.work, start.ready, start.options, start.coordinates
    targets, loss, labels = start.targets, ready.work.loss, options.labels
    check_room(work, options, 1 if everyone is None else everyone.size)
    cluster = None if clusters is None else coded(clusters, len(ready.work.sequences))
    within = options  # memory that is known before it is asked for what the run depends on
    if everyone is not None:
        within = replace(options, memory_limit=common_limit(everyone, options, next(iter(params.values())).device))
    numbers = count()  # of the passes: there are more than one where rows are not finite

    def passed_by(way: str, note: str, refused: Mapping[str, str], rows: Workload) -> tuple[dict[str, Any], Provenance]:
        number = next(numbers)
        folder = None if checkpoint is None else Path(checkpoint, *([f"again-{number}"] if number else []))
        first = number == 0  # what a check has refused, or some of the rows, is planned anew
        note = note or (plan.reason if first and plan is not None and plan.reason else "")
        here = replace(within, refused=refused, plan=options.plan if first else None)
        marks = partial(fingerprint, options=options, route=way, coordinates=coordinates, targets=start.targets.name)
        if everyone is not None:
            pass_of_rank = partial(passed_by_route, route=way, coordinates=coordinates, note=note)
            return passed_over_ranks(everyone, rows, here, pass_of_rank, folder, marks)
        kept = opened(None if folder is None else folder_of(folder), partial(marks, rows))
        grams, how = passed_by_route(rows, here, way, coordinates, kept, note)
        return grams, replace(how, resumed=kept.resumed or None)

    def done_by(way: str, note: str, refused: Mapping[str, str]) -> SoundPass:
        of = "block" if labels else "parameter"
        return sound_pass(work, partial(passed_by, way, note, refused), unit=unit, drop_nonfinite=drop_nonfinite, of=of)

    done = done_by(route, "", {})
    checked, measured = None, RoundOff(errors=None, reason="self_check=False")
    if self_check:
        limit = within.limit(next(iter(params.values())).device)
        how: dict[str, Any] = {"labels": labels, "coordinates": coordinates, "limit": limit, "seed": seed}
        done, checked = certified(done, done_by, check=None if everyone is None else certify_over_ranks, **how)
        again = replace(within, memory_limit=limit // 4, tried=False, progress=None, plan=None)
        again = replace(again, refused={**(done.how.given_up or {}), **(done.how.formed_parameters or {})})
        route_there = done.how.route or route
        measured = round_off(
            done.grams,
            done.rows,
            checked.differences,
            lambda rows: passed_by_route(rows, again, route_there, coordinates, NOWHERE, "")[0],
            agreed=None if everyone is None else partial(everyone.from_first, "round-off"),
            **how,
            stack_width=done.how.stack_width or 1,
        )
    took = outcome()
    provenance = Provenance(
        dropped_tokens=ready.num_dropped + ready.work.num_tokens - done.num_tokens,
        gram_dtype=dtype_name(gram_dtype),
        accumulated="by parameter" if blocks is None else rule_name(blocks),
        self_check=None if checked is None else checked.to_dict(),
        round_off=measured.to_dict(),
        plan_given=plan is not None,
        approximations=[f"at most {max_coordinates} coordinates a block, seed {seed}"] if coordinates.index else [],
        sampled_parameters=sorted(coordinates.index),
        outcome=took,
        pass_time_s=took["seconds"],
        num_summed_tokens=done.num_tokens if unit == "sequence" else None,
    )
    provenance |= provenance_of_rows(ready, done.rows, targets, unit=unit, seed=seed) | done.how
    if everyone is not None:
        provenance |= facts_of_ranks(everyone, done, took)
    return (TokenGrams if everyone is None else DividedGrams)(
        grams=done.grams,
        tokens=named(done.rows, unit, cluster),
        scale={},  # also for sequences: their rows are formed as sums, no Gram of single tokens cancels (by_sequence)
        num_params=_by_label(work.num_params, options),
        unit=unit,
        centered=False,
        precision=coarsest(ready.work.nature.precision, *(p.dtype for p in params.values())),
        provenance=provenance,
        labels=labels,
        errors=None if measured.errors is None else _like(done.grams, measured.errors),
    )


def _like(grams: Mapping[str, AnyGram], values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: grams[name].new_tensor(value) for name, value in values.items()}


def _by_label(num_params: Mapping[str, int], options: PassOptions) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for name, size in num_params.items():
        summed[options.label(name)] += size
    return dict(summed)
