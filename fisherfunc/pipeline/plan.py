"""`plan`: what `fisher_spectrum` would do with a model and a batch, and what it would take; no token is passed over."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.planning.calibrate import least_seconds
from fisherfunc.gradients.planning.forecast import forecast
from fisherfunc.gradients.planning.over_ranks import check_rates, over_ranks
from fisherfunc.gradients.planning.run_plan import RunPlan, timed, with_eigensolve
from fisherfunc.gradients.ranks.deal import dealt
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.rows.targets import Targets, chosen
from fisherfunc.gradients.start import started
from fisherfunc.gradients.survey.prepare import check_options
from fisherfunc.linalg.gram import of_rows
from fisherfunc.linalg.kernels import robust_eigh
from fisherfunc.linalg.lifting import GramKernel
from fisherfunc.models.functionalize import Selection, functionalize
from fisherfunc.partitioning import by_layer, partition
from fisherfunc.pipeline.fisher import check_eigensolver, check_intervals, token_loss
from fisherfunc.pipeline.inputs import inputs_of
from fisherfunc.pipeline.needed import tokens_needed
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.solve import IntervalMethod
from fisherfunc.population.clusters import ClusterLabels
from fisherfunc.records.axes import Batch, Progress
from fisherfunc.runtime.precision import full_precision

SOLVED = 768
"""The largest matrix that the calibration solves."""
LEAST_CUBIC = 0.125
"""The least of its time that is taken to grow with the cube of the size: a difference of two times is no better."""


@full_precision()
@torch.inference_mode(mode=False)
def plan(
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
    clusters: ClusterLabels = None,
    progress: Progress | None = None,
    calibrate: bool = True,
    pilot: FisherSpectrum | None = None,
    ranks: int | None = None,
    rates: Mapping[str, float] | None = None,
) -> RunPlan:
    """What `fisher_spectrum` would do with the same arguments, and what it would take.

    Nothing is passed over. Cost: one forward pass of each sequence, to find its tokens; the probe, and the check on a
    few tokens, that each run starts with; about a second of calibration, which times the kernels on matrices of the
    plan's shapes, and a chunk or two of backward passes.

    Args:
        model: Any module; it is left as it was.
        batch: As for `fisher_spectrum`.
        loss: As for `fisher_spectrum`, as is all but the last; what does not touch the pass is looked at for errors.
        targets: Which Fisher.
        blocks: Parameter name → block label.
        center: Whether to subtract the mean gradient.
        unit: "token" or "sequence".
        num_tokens: At most this many tokens, picked by seed.
        seed: Of whatever is picked.
        kernel: Gram → spectrum.
        route: "factored" or "dense".
        parameters: "trainable", "all", names or glob patterns, or a predicate.
        dtype: What the pass would run in.
        device: Where it would run.
        memory_limit: In bytes, beyond the model; half of what is free where None.
        chunk_size: Tokens a batched backward pass.
        eigensolve_device: Where eigenvalues would be solved.
        eigensolve_dtype: What they would be solved in.
        max_coordinates: How many gradient coordinates a block, where not all.
        drop_nonfinite: Whether tokens that are not finite would be left out.
        self_check: Whether the Grams would be checked.
        checkpoint: The folder of the run; nothing is written to it.
        intervals: Confidence intervals.
        population: Whether to estimate what holds of the population.
        clusters: A label per sequence.
        progress: Not called.
        calibrate: Whether to predict seconds.
        pilot: An earlier result of this model and text, with estimates of the population, from which to say how many
            tokens its numbers take to be within 10 % (`ff.tokens_needed`).
        ranks: How many ranks the same run is to be predicted for as well, in `.over_ranks`.
        rates: What a rank would do in a second, for a machine that is not here: operations of "passes", "contraction"
            and "eigensolve", and "bytes" sent; those measured here, and 1e9 bytes, where not given.

    Returns:
        Passes, routes, operations, seconds and bytes, predicted. `fisher_spectrum(…, plan=)` runs it, for this batch or
        any other of the same shapes, and then discovers nothing again.

    Raises:
        ValueError: If an option or the batch is unusable, as `fisher_spectrum` does.
        TypeError: If the model or the batch is of a kind that it cannot be.

    Example:
        >>> found = plan(nn.Linear(2, 3), (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])), calibrate=False)
        >>> found.num_units, found.num_passes, found.parameters["bias"].route
        (5, 1, 'elementwise')
    """
    begin = perf_counter()
    check_options(num_tokens, chunk_size, memory_limit, route, unit)
    if ranks is not None and (not isinstance(ranks, int) or ranks < 1):
        raise ValueError(f"ranks expected how many, at least 1, got ranks={ranks!r}")
    check_rates(rates)
    check_eigensolver(kernel, eigensolve_device, eigensolve_dtype)
    fn = functionalize(model, parameters=parameters).to(dtype=dtype, device=device)
    targets = chosen(targets, unit=unit, center=center)
    like = next(iter(fn.params.values()))
    batch = inputs_of(fn, batch, num_tokens, lambda first: token_loss(loss, model, first)).batches
    check_intervals(intervals, batch)
    start = started(
        fn,
        fn.at(fn.params),
        batch,
        token_loss(loss, model, batch),
        targets=targets,
        unit=unit,
        num_tokens=num_tokens,
        seed=seed,
        route=route,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        blocks=blocks,
        max_coordinates=max_coordinates,
        drop_nonfinite=drop_nonfinite,
        self_check=self_check,
        for_plan=True,
    )
    work = summed(start.work) if unit == "sequence" else start.work
    spent = perf_counter() - begin
    needed = {} if pilot is None else {name: asdict(one) for name, one in tokens_needed(pilot).items()}
    found = forecast(work, start.options, route=route, coordinates=start.coordinates, calibrate=calibrate)
    found = replace(found, made_for=start.made_for, needed_tokens=needed)
    num_blocks = len(partition(fn.params, blocks))
    if calibrate:
        found = timed(found, preparation=found.seconds["preparation"] + spent)
        rate = _eigensolve_rate(work.num_tokens, eigensolve_dtype, like.device)
        found = with_eigensolve(found, num_blocks, rate)
    else:
        found = with_eigensolve(found, num_blocks)
    if ranks is None:
        return found
    predicted = over_ranks(found, ranks, share=dealt(work, ranks).share, num_grams=num_blocks, rates=rates)
    return replace(found, over_ranks=predicted.to_dict())


def _eigensolve_rate(num_units: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of an eigensolve, 4/3 N³ of them.

    Half of these wait for memory where the matrix is small: seconds are a N² + b N³, by solves of two sizes.
    """
    size = min(num_units, SOLVED)
    taken, times = _solving_seconds(size, dtype, device), num_units / size
    share = 1.0
    if times > 1.0:
        share = min(1.0, max(LEAST_CUBIC, 2.0 - 8.0 * _solving_seconds(size // 2, dtype, device) / taken))
    return 4.0 / 3.0 * num_units**3 / (taken * ((1.0 - share) * times**2 + share * times**3))


def _solving_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    rows = torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    gram, kernel = of_rows(rows.to(device)), robust_eigh(dtype=dtype, device=device)
    return least_seconds(lambda: kernel(gram), device)
