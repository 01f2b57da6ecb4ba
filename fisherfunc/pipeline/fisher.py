"""`fisher_spectrum`: a model and a batch in, the spectra of its Fisher information out, empirical or true."""

import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fisherfunc.distributed.collectives import Everyone, Ranks
from fisherfunc.distributed.entering import with_ranks
from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.grams import token_grams
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.losses.asked import token_loss_of
from fisherfunc.gradients.planning.run_plan import RunPlan, eigensolve_operations, solver_bytes
from fisherfunc.gradients.rows.targets import Targets, chosen
from fisherfunc.gradients.sketched import rows
from fisherfunc.linalg.grams.divided import DividedGrams
from fisherfunc.linalg.grams.sketches import Kronecker
from fisherfunc.linalg.kernels import robust_eigh
from fisherfunc.linalg.lifting import GramKernel
from fisherfunc.linalg.sound_spectrum import check_kernel
from fisherfunc.models.functionalize import Selection, functionalize
from fisherfunc.partitioning import by_layer, partition
from fisherfunc.pipeline.inferred_loss import inferred_loss
from fisherfunc.pipeline.inputs import inputs_of
from fisherfunc.pipeline.methods.over_ranks import spectrum_of_divided
from fisherfunc.pipeline.methods.sketches import spectrum as sketched_spectrum
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.solve import IntervalMethod, interval_method, spectrum_of_grams
from fisherfunc.records.axes import Batch, Progress
from fisherfunc.records.plain import dtype_name
from fisherfunc.runtime.precision import full_precision


@with_ranks()
@full_precision()
@torch.inference_mode(mode=False)
def fisher_spectrum(
    model: nn.Module,
    batch: Batch,
    *,
    loss: TokenLoss | Callable[[Any, Batch], torch.Tensor] | None = None,
    targets: Targets | None = None,
    blocks: Callable[[str], str] = by_layer,
    center: bool = False,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    kernel: GramKernel | None = None,
    plan: RunPlan | None = None,
    route: str = "factored",
    parameters: Selection = "trainable",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_limit: int | None = None,
    chunk_size: int | None = None,
    eigensolve_device: torch.device | str = "auto",
    eigensolve_dtype: torch.dtype = torch.float64,
    max_coordinates: int | None = None,
    drop_nonfinite: bool = False,
    self_check: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    intervals: IntervalMethod = None,
    population: bool = True,
    clusters: Iterable[Hashable] | torch.Tensor | None = None,
    sketch: Kronecker | None = None,
    ranks: Ranks | Everyone | None = None,
    progress: Progress | None = None,
) -> FisherSpectrum:
    """Compute the spectrum of the empirical Fisher information F = (1/N) Σ_n g_n g_nᵀ, g_n = ∇ℓ_n, a term per token.

    Or of the true one, where `targets` are the model's own. Exact by default. Cost: a backward pass a token and the
    Grams (see `token_grams`), then 4/3 N³ operations for the eigenvalues of each block and of the full matrix.

    Args:
        model: Any module; it is left as it was. Evaluated in evaluation mode.
        batch: Keyword arguments of the model with `labels`, or a tuple (*inputs, targets), or a list of these, or a
            DataLoader that does not shuffle, a Hugging Face data set, or any iterable of batches that begins anew each
            time. Lists and arrays with an entry a sequence are divided as tensors are, packed rows into documents.
        loss: A token loss, one of torch's (`torch.nn.CrossEntropyLoss()`), or a function (output, batch) → losses not
            reduced over tokens; inferred where None, and held against the model's own loss where it has one.
        targets: `ff.targets.observed()`, also where None: the empirical Fisher; `ff.targets.sampled(num_draws)` or
            `ff.targets.all_classes()`: the true one, estimated or exact.
        blocks: Parameter name → block label.
        center: Whether to subtract the mean gradient: the gradient covariance.
        unit: "token", or "sequence": one row, and one backward pass, a sequence, the sum over its tokens.
        num_tokens: At most this many tokens, picked by seed; of a loader, a data set or an iterable, from the first
            batches that hold so many, and no more are read.
        seed: Of whatever is picked.
        plan: From `ff.plan` with the arguments of this call, for this batch or one of the same shapes: nothing is then
            discovered again, and the check at the end is the same. What does not touch the pass may differ: `kernel`,
            `center`, `intervals`, `population`, `clusters`, `checkpoint`, `progress`; the loss may be left out.
        kernel: Gram → spectrum, of `ff.kernels` or your own; what it returns is checked. `robust_eigh` where None.
        route: How the Grams are computed, exactly either way: "factored", or "dense" (see `token_grams`).
        parameters: "trainable", "all", names or glob patterns, or a predicate (see `functionalize`).
        dtype: What the pass runs in; that of the model where None.
        device: Where the pass runs; where the model lies if None.
        memory_limit: In bytes, beyond the model; half of what is free where None.
        chunk_size: Tokens a batched backward pass.
        eigensolve_device: Where eigenvalues are solved; "auto" is where the Grams lie, or the CPU where that device has
            no float64.
        eigensolve_dtype: What eigenvalues are solved in.
        max_coordinates: Approximate: at most this many gradient coordinates a block; named in the metadata.
        drop_nonfinite: Whether to leave out tokens with a loss or gradient that is not finite, and count them.
        self_check: Whether to hold the Grams against one ordinary backward pass of the batch; `metadata["self_check"]`
            says how far they were off (see `token_grams`).
        checkpoint: A folder from which the same call goes on where it was stopped, to the same bits (`token_grams`).
        intervals: Confidence intervals of traces: "bootstrap" or "jackknife" (see `spectrum_of_grams`).
        population: Whether to estimate what holds of the population as well, where there are three sequences or more.
        clusters: A label per sequence of the batch, where sequences are not independent of each other (windows of a
            document, answers to a prompt): they take the place of sequences in all that is said of the population.
        sketch: From `ff.sketches.kronecker(rank=…)`. Approximate, and marked so: gradients are projected, twice, and
            `metadata["sketch"]` has the error of that beside every metric (see `ff.sketches.spectrum`); nothing is said
            of the population.
        ranks: From `ff.distributed.ranks()`, under `torchrun`: the processes that share the work, each of which makes
            this same call, with the whole batch, and gets the same result. Sequences are dealt to them, and the blocks
            to be solved; `memory_limit` is of each. `metadata["ranks"]` says what each had to do.
        progress: Called as `progress(done, total)`; of ranks, with this one's share.

    Returns:
        Spectra by block, of the block-diagonal and of the full matrix, with metadata.

    Raises:
        ValueError: If an option or the batch is unusable, or a loss or gradient is not finite; it says what and where.
            If the plan was made for something else: a `PlanMismatchError`, which names it.
            If targets are others than the observed ones: also for a loss without a predictive distribution, `center`,
            `all_classes` of sequences, or more classes than the memory limit has room for.
        TypeError: If the model or the batch is of a kind that it cannot be, or the kernel does not take a Gram or
            returns no spectrum.
        OSError: If the checkpoint cannot be written.
        torch.linalg.LinAlgError: If every eigensolver failed, or the kernel returned no spectrum of the Gram.
        ff.distributed.RanksError: If another rank fails, is gone or hangs; it names which, and why.

    Example:
        >>> result = fisher_spectrum(nn.Linear(2, 3), (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])))
        >>> result.full.num_tokens, result.full.num_params
        (5, 9)
    """
    begin = perf_counter()
    if unit not in ("token", "sequence"):
        raise ValueError(f"unit expected 'token' or 'sequence', got unit={unit!r}")
    fn = functionalize(model, parameters=parameters).to(dtype=dtype, device=device)
    targets = chosen(targets, unit=unit, center=center)
    if sketch is not None:
        beside: dict[str, Any] = {"center": center, "plan": plan, "max_coordinates": max_coordinates}
        beside |= {"checkpoint": checkpoint, "intervals": intervals, "clusters": clusters, "ranks": ranks}
        beside |= {"drop_nonfinite": drop_nonfinite, "route='dense'": route == "dense"}
        beside |= {"self_check=False": not self_check}
        _check_sketch(sketch, beside)
    partition(fn.params, blocks)  # what fails does so before the pass
    check_eigensolver(kernel, eigensolve_device, eigensolve_dtype)
    like = next(iter(fn.params.values()))
    data = inputs_of(fn, batch, num_tokens, lambda first: token_loss(loss, model, first, plan))
    batch = data.batches
    check_intervals(intervals, batch)
    solve_on = _eigensolve_device(eigensolve_device, like.device)
    usual = eigensolve_dtype == torch.float64 and solve_on == like.device
    own = None if usual else robust_eigh(dtype=eigensolve_dtype, device=solve_on)
    passed: dict[str, Any] = {
        "targets": targets,
        "unit": unit,
        "num_tokens": num_tokens,
        "seed": seed,
        "chunk_size": chunk_size,
        "memory_limit": memory_limit,
        "progress": progress,
    }
    if sketch is not None:
        projected = rows(fn, fn.params, batch, token_loss(loss, model, batch), sketch=sketch, **passed)
        result = sketched_spectrum(projected, blocks=blocks, kernel=kernel or own)
    else:
        grams = token_grams(
            fn,
            fn.params,
            batch,
            token_loss(loss, model, batch, plan),
            **passed,
            route=route,
            blocks=blocks,
            max_coordinates=max_coordinates,
            drop_nonfinite=drop_nonfinite,
            self_check=self_check,
            checkpoint=checkpoint,
            plan=plan,
            clusters=clusters,
            ranks=ranks,
        )
        asked: dict[str, Any] = {"center": center, "intervals": intervals, "population": population}
        if isinstance(grams, DividedGrams):
            result = spectrum_of_divided(grams, blocks=blocks, kernel=kernel or own, **asked)
        else:
            result = spectrum_of_grams(grams, blocks=blocks, unit=unit, kernel=kernel or own, **asked)
        result = replace(result, provenance=replace(result.provenance, plan=_with_eigensolve(result)))
    provenance = replace(
        result.provenance,
        model=fn.name,
        mode="evaluation",
        num_frozen_params=sum(p.numel() for p in fn.frozen.values()),
        eigensolve_dtype=None if kernel else dtype_name(eigensolve_dtype),
        wall_time_s=perf_counter() - begin,
        data=data.facts,
    )
    return replace(result, provenance=provenance)


def _check_sketch(sketch: Any, beside: dict[str, Any]) -> None:
    """Raise where it is none, or asked for with what projected rows are not made with."""
    if not isinstance(sketch, Kronecker):
        raise TypeError(f"sketch expected that of ff.sketches.kronecker(rank=…), got {sketch!r}")
    given = [name for name, value in beside.items() if value is not None and value is not False]
    if given:
        raise ValueError(
            f"sketch= got {', '.join(given)} beside it, which projected rows are made without; leave out either, or "
            "take the rows from ff.sketches.rows"
        )


def _with_eigensolve(result: FisherSpectrum) -> dict[str, Any]:
    """The plan of the pass, with the eigensolves."""
    plan, num_blocks = dict(result.provenance.plan or {}), len(result.blocks)
    count = plan["num_units"]
    operations = {**plan["operations"], "eigensolve": eigensolve_operations(count, num_blocks)}
    peak = max(plan["peak_bytes"], solver_bytes(count, num_blocks))
    return {**plan, "operations": operations, "peak_bytes": peak}


def token_loss(loss: Any, model: nn.Module, batch: Batch, plan: RunPlan | None = None) -> TokenLoss:
    """Read a loss as a token loss; without one, take the plan's, or infer what the model was made for.

    Raises:
        TypeError: If it is no loss.
        ValueError: If what is inferred is not the model's own loss.
    """
    if loss is None and plan is not None and plan.made_for is not None:
        return plan.made_for.loss
    return inferred_loss(model, batch) if loss is None else token_loss_of(loss, batch)


def check_intervals(intervals: IntervalMethod, batch: Batch) -> None:
    """Raise a ValueError where there are to be intervals, and the batch is of one sequence."""
    if interval_method(intervals) is not None and len(split(batch)) == 1:
        raise ValueError(
            f"intervals={intervals!r} needs at least 2 sequences, and the batch has one: the tokens of a sequence "
            "depend on each other, and only differences between sequences show how sure a number is; give more of them"
        )


def check_eigensolver(kernel: GramKernel | None, device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise where a kernel takes no Gram, or the options for one of ours are unusable, before the pass."""
    if kernel is not None:
        check_kernel(kernel)
        if str(device) != "auto" or dtype != torch.float64:
            raise ValueError(
                f"kernel= got eigensolve_device={str(device)!r} and eigensolve_dtype={dtype} beside it, which it does "
                "not see; make it with its own: ff.kernels.robust_eigh(dtype=..., device=...)"
            )
        return
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"eigensolve_dtype expected torch.float64 or torch.float32, got {dtype}")
    if str(device) != "auto":
        try:
            torch.zeros(1, dtype=dtype, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:  # unknown, not compiled in, or without this dtype
            raise ValueError(f"eigensolve_device={str(device)!r} cannot be used with {dtype}: {error}") from error


def _eigensolve_device(choice: torch.device | str, grams_on: torch.device) -> torch.device:
    if str(choice) != "auto":
        return torch.device(choice)
    return torch.device("cpu") if grams_on.type == "mps" else grams_on
