"""`token_grams`: the one expensive pass. Everything else is algebra on what it returns."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint, opened
from fisherfunc.gradients.dense.route import dense_grams
from fisherfunc.gradients.dense.slabs import DensePlan
from fisherfunc.gradients.dense.subsample import EVERY, Coordinates, sample_coordinates
from fisherfunc.gradients.factored.route import NotFactorable, factored_grams
from fisherfunc.gradients.fingerprint import fingerprint
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.model_function import ModelFunction
from fisherfunc.gradients.pullback import check_reach
from fisherfunc.gradients.rows import losses_of
from fisherfunc.gradients.self_check import check_grams
from fisherfunc.gradients.sequences import split
from fisherfunc.gradients.sound import named, sound_pass
from fisherfunc.gradients.survey import survey
from fisherfunc.gradients.workload import PassOptions, Workload
from fisherfunc.linalg.token_grams import TokenGrams, Tokens
from fisherfunc.partitioning import labels_of, partition, rule_name
from fisherfunc.records.axes import Batch, Params, Progress
from fisherfunc.records.dtypes import dtype_name
from fisherfunc.records.versions import versions

ROUTES = ("factored", "dense")
UNITS = ("token", "sequence")


@torch.inference_mode(mode=False)
def token_grams(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: TokenLoss,
    *,
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
    self_check: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> TokenGrams:
    """The Gram matrix K_p = G_p G_pᵀ of every parameter tensor: unnormalised, exact.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batch: A batch, or a list of them.
        loss: The token loss.
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
        self_check: Whether to compare the Grams with ordinary backward passes on a few tokens (see self_check.py).
        checkpoint: A folder in which the pass keeps what it has done: the same call goes on from there, to the same
            bits, and after the end takes the Grams from there. Each run needs a folder of its own; nothing deletes it.
        progress: Called as `progress(done, total)`, in backward passes of one token.

    Returns:
        One Gram a parameter (or a block), and which unit each row is.

    Raises:
        ValueError: If no token is valid, an option is out of range, the memory limit is below the smallest chunk, a
            loss or gradient is not finite (the error names sequence, position and parameter), or the checkpoint is of
            another run (it says what differs).
        OSError: If the checkpoint cannot be written.
    """
    _check_options(num_tokens, chunk_size, memory_limit, route, unit)
    begin = perf_counter()
    params, sequences = fn.at(params), split(batch)
    found, dropped = survey(fn, params, sequences, loss, drop_nonfinite=drop_nonfinite)
    tokens = _pick(found, num_tokens, seed)
    check_reach(losses_of(fn, params, sequences, loss)[int(tokens.sequence[0])], params)
    num_params = {name: p.numel() for name, p in params.items()}
    coordinates = EVERY
    if max_coordinates is not None:
        parts = partition(params, coordinate_blocks or blocks or (lambda name: name))
        coordinates = sample_coordinates(num_params, parts, max_coordinates=max_coordinates, seed=seed)
    work = Workload(fn=fn, params=params, sequences=sequences, loss=loss, tokens=tokens)
    labels = None if blocks is None else labels_of(partition(params, blocks))
    options = PassOptions(
        chunk_size=chunk_size, memory_limit=memory_limit, gram_dtype=gram_dtype, labels=labels, progress=progress
    )
    numbers = count()  # of the passes: there are more than one where a sequence's row is not finite

    def passed(rows: Workload) -> tuple[dict[str, Tensor], dict[str, Any]]:
        number = next(numbers)
        folder = None if checkpoint is None else Path(checkpoint, *([f"again-{number}"] if number else []))
        kept = opened(folder, partial(fingerprint, rows, options, route, coordinates))
        return _passed(rows, options, route, coordinates, kept)

    done = sound_pass(work, passed, unit=unit, drop_nonfinite=drop_nonfinite, of="block" if labels else "parameter")
    checked = check_grams(done.grams, done.rows, labels=labels, seed=seed) if self_check else None
    facts: dict[str, Any] = {
        "fisher": "empirical",
        "targets": "observed",
        "loss": loss.name,
        "shift": loss.shift,
        "num_valid_tokens": len(found.sequence),
        "dropped_tokens": dropped + work.num_tokens - done.num_tokens,
        "seed": int(seed),
        "dtype": "+".join(sorted({dtype_name(p.dtype) for p in params.values()})),
        "gram_dtype": dtype_name(gram_dtype),
        "accumulated": "by parameter" if blocks is None else rule_name(blocks),
        "device": str(next(iter(params.values())).device),
        **done.how,
        "self_check": checked,
        "approximations": [f"at most {max_coordinates} coordinates a block, seed {seed}"] if coordinates.index else [],
        "sampled_parameters": sorted(coordinates.index),
        "versions": versions(),
        "pass_time_s": perf_counter() - begin,
    }
    return TokenGrams(
        grams=done.grams,
        tokens=named(done.rows, unit),
        scale={},  # also for sequences: their rows are formed as sums, no Gram of single tokens cancels (by_sequence)
        num_params=_by_label(num_params, options),
        unit=unit,
        centered=False,
        precision=max((p.dtype for p in params.values()), key=lambda dtype: torch.finfo(dtype).eps),
        metadata=facts | ({"num_summed_tokens": done.num_tokens} if unit == "sequence" else {}),
        labels=labels,
    )


def _by_label(num_params: Mapping[str, int], options: PassOptions) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for name, size in num_params.items():
        summed[options.label(name)] += size
    return dict(summed)


def _passed(
    work: Workload, options: PassOptions, route: str, coordinates: Coordinates, checkpoint: Checkpoint = NOWHERE
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The Grams by a route, and how they were computed."""
    reason = "asked for" if route == "dense" else "coordinates are sampled"
    if isinstance(checkpoint.plan, DensePlan):
        reason = checkpoint.note
    elif route == "factored" and not coordinates.index:
        try:
            grams, plan = factored_grams(work, options, checkpoint)
        except NotFactorable as unfit:
            reason = str(unfit)
        else:
            return grams, {
                "route": "factored",
                "passes": len(plan.groups) + plan.num_slabs,
                "chunk_size": plan.chunk_size,
                "predicted_peak_bytes": plan.peak_bytes,
                "causal_prefixes": plan.structure.causal,
                "output_layer": plan.structure.head[0] if plan.structure.head else None,
                "stack_width": plan.width,
                "formed_parameters": plan.formed,
                "slabbed_parameters": list(plan.slabbed),
            }
    outcome = dense_grams(work, options, coordinates=coordinates, checkpoint=checkpoint, note=reason)
    return outcome.grams, {
        "route": "dense",
        "route_reason": reason,
        "passes": len(outcome.plan.slabs),
        "chunk_size": outcome.plan.chunk_size,
        "predicted_peak_bytes": outcome.plan.peak_bytes,
        "method": outcome.method,
    }


def _check_options(num_tokens: int | None, chunk_size: int | None, memory_limit: Any, route: str, unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"unit expected 'token' or 'sequence', got unit={unit!r}")
    if route not in ROUTES:
        raise ValueError(f"route expected one of {ROUTES}, got route={route!r}")
    if memory_limit is not None and not isinstance(memory_limit, int):
        raise TypeError(f"memory_limit expected a number of bytes, got {memory_limit!r}; 2 GB are 2_000_000_000")
    for name, value in (("num_tokens", num_tokens), ("chunk_size", chunk_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} expected at least 1, got {name}={value}")


def _pick(tokens: Tokens, num_tokens: int | None, seed: int) -> Tokens:
    count = len(tokens.sequence)
    if num_tokens is None or num_tokens >= count:
        return tokens
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return tokens.select(order[:num_tokens].sort().values.to(tokens.sequence.device))
