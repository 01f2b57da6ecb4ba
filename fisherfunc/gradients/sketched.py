"""The pass of projected rows: N × k numbers a weight, of factors that are projected before they are multiplied.

The passes are those of the factored route (factored/), in whose place of Grams two independent projections of each
gradient are summed up; what that route cannot take is formed and projected. Both are held against one ordinary backward
pass of the batch: Σ uₙ S gₙ = S ∇ Σ uₙ ℓₙ for random signs u, of every tensor and both projections. Axis order: n rows,
k columns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff import pullback
from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.autodiff.nature import coarsest
from fisherfunc.gradients.capture.structure import Unsettled
from fisherfunc.gradients.checkpoint import NOWHERE
from fisherfunc.gradients.checks.ordinary import signed_sizes
from fisherfunc.gradients.checks.sound import named
from fisherfunc.gradients.dense.norms import chunk_size_of
from fisherfunc.gradients.directions.passes import passes_of, weighted
from fisherfunc.gradients.factored.descent import Descent
from fisherfunc.gradients.factored.passes import Passes
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factored.route import NotFactorable, planned, slab_pass
from fisherfunc.gradients.factors.pieces import Piece
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.gradients.provenance import provenance_of_rows
from fisherfunc.gradients.rows.gradient_rows import gradient_chunks, losses_of
from fisherfunc.gradients.rows.stacks import stacks_of
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.rows.targets import Targets
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.gradients.start import started
from fisherfunc.linalg.grams.sketched_rows import SketchedRows
from fisherfunc.linalg.grams.sketches import Kronecker, Projection, projections
from fisherfunc.records.axes import Batch, Params, Progress
from fisherfunc.records.hashing import SHORT, hash_of
from fisherfunc.runtime.precision import full_precision

Halves = tuple[Projection, Projection]
Rows = dict[str, Float[Tensor, "2 n _k"]]
TOLERANCE = 0.6
"""The power of eps by which a sum of projected rows may differ from the projected sum, of the size of the rows."""
ROUNDING = 1024
"""In eps, of the size of the rows of all tensors."""


@full_precision()
@torch.inference_mode(mode=False)
def rows(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: AnyLoss,
    *,
    sketch: Kronecker,
    targets: Targets | None = None,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> SketchedRows:
    """Project the gradient of every token by two independent sketches. Approximate, and marked so.

    Memory: 2 N k² numbers a weight, k the rank, beside what a pass takes; no N × N matrix, and no gradient of a weight
    that enters through linear maps. Cost: a backward pass a token, as of `token_grams`, without the contractions.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batch: As of `token_grams`.
        loss: As of `token_grams`.
        sketch: `ff.sketches.kronecker(rank=…, seed=…)`.
        targets: Which targets, as of `token_grams`.
        unit: What a row is: "token" or "sequence".
        num_tokens: At most this many tokens, as of `token_grams`.
        seed: Of whatever is picked.
        chunk_size: Tokens a batched backward pass.
        memory_limit: In bytes, beyond the model and the rows; half of what is free where None.
        progress: Called as `progress(done, total)`, in backward passes of one token.

    Returns:
        The rows, whose `grams()` go wherever exact Grams do.

    Raises:
        ValueError: As `token_grams`; if a gradient is not finite, or the rows do not add up to an ordinary gradient.

    Example:
        >>> import fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Linear(40, 30))
        >>> batch = (torch.randn(5, 40), torch.tensor([0, 1, 2, 0, 1]))
        >>> loss = ff.losses.classification()
        >>> found = ff.sketches.rows(fn, fn.params, batch, loss, sketch=ff.sketches.kronecker(rank=4))
        >>> {name: tuple(both.shape) for name, both in found.rows.items()}
        {'weight': (2, 5, 16), 'bias': (2, 5, 16)}
    """
    params = fn.at(params)
    start = started(
        fn,
        params,
        batch,
        loss,
        targets=targets,
        unit=unit,
        num_tokens=num_tokens,
        seed=seed,
        chunk_size=chunk_size,
        memory_limit=memory_limit,
        self_check=False,  # by the rows themselves (`_difference`)
        progress=progress,
    )
    work = summed(start.work) if unit == "sequence" else start.work
    halves = {name: projections(sketch, name, p.shape, like=p) for name, p in work.params.items()}
    try:
        found, reason = _factored(work, start.options, halves), ""
        difference = _difference(work, found, halves)
        if difference is not None:
            reason = f"the factored route failed the check: {difference}"
    except NotFactorable as unfit:
        reason = str(unfit)
    if reason:
        found = _formed(work, start.options, halves)
        difference = _difference(work, found, halves)
        if difference is not None:
            raise ValueError(
                f"the projected rows do not add up to an ordinary gradient of the batch: {difference}; a model that "
                "draws at random, or acts on how many samples there are, does this"
            )
    ready = start.ready
    exact = sorted(name for name, pair in halves.items() if pair[0].exact)
    return SketchedRows(
        shards=(found,),
        tokens=named(work, unit, None),
        num_params=dict(work.num_params),
        unit=unit,
        sketch=sketch,
        precision=coarsest(ready.work.nature.precision, *(p.dtype for p in work.params.values())),
        provenance=replace(
            provenance_of_rows(ready, work, start.targets, unit=unit, seed=seed),
            parameters=hash_of(dict(work.params))[:SHORT],
            gram_dtype="float64",
            route="dense" if reason else "factored",
            route_reason=reason or None,
            dropped_tokens=ready.num_dropped,
            exact_parameters=exact,
        ),
    )


def _empty(work: Workload, halves: Mapping[str, Halves]) -> Rows:
    columns = {name: halves[name][0].num_columns for name in work.params}
    dtypes = {name: torch.promote_types(p.dtype, torch.float32) for name, p in work.params.items()}
    return {n: p.new_zeros(2, work.num_tokens, columns[n], dtype=dtypes[n]) for n, p in work.params.items()}


def _factored(work: Workload, options: PassOptions, halves: Mapping[str, Halves]) -> Rows:
    """The rows by the passes of the factored route.

    Raises:
        NotFactorable: If it is not right for the model.
    """
    plan = planned(work, options)
    while True:
        if not plan.groups:
            raise NotFactorable("the memory limit has no room for the factors of any tensor")
        found = _empty(work, halves)
        try:
            for piece in _pieces(work, options, plan):
                _add(found, piece, halves)
            break
        except Unsettled as unsettled:
            structure = unsettled.structure
        plan = planned(work, options, structure)
    if plan.slabbed:
        found |= _formed(*slab_pass(work, options, plan, held=0), halves)
    return found


def _pieces(work: Workload, options: PassOptions, plan: FactoredPlan) -> Iterator[Piece]:
    """The pieces of all groups and stacks.

    Raises:
        NotFactorable: If a rule cannot be batched, in a sequence other than the one probed.
        Unsettled: If the structure does not hold for some sequences.
    """
    stacks = list(stacks_of(work.sequences, work.tokens, plan.width))
    counted = Passes(NOWHERE, [stack.num_tokens for stack in stacks], len(plan.groups), options.progress)
    descent = Descent(work, stacks, plan, NOWHERE)
    try:
        for number, group in enumerate(plan.groups):
            for index in range(len(stacks)):
                pieces = descent.pieces(number, index, counted.of(number))
                yield from (piece for piece in pieces if piece.name in group.names)
            descent.done(number)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of the passes: what is done with a piece does not come through here
        raise NotFactorable(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _add(found: Rows, piece: Piece, halves: Mapping[str, Halves]) -> None:
    """Gradients of several uses add up; `found` is written to."""
    target = found[piece.name]
    for half, projection in enumerate(halves[piece.name]):
        if isinstance(piece.part, Tensor):
            part = projection.of_gradients(piece.part)
        else:
            part = projection.of_factors(piece.part)
        target[half].index_add_(0, piece.rows.to(target.device), part.to(target.dtype))


def _formed(work: Workload, options: PassOptions, halves: Mapping[str, Halves]) -> Rows:
    """The rows by gradients that are formed, a chunk of tokens at a time."""
    found = _empty(work, halves)
    losses = losses_of(work.fn, work.params, work.sequences, work.loss)
    method = pullback.choose(losses(int(work.tokens.sequence[0])), work.params)
    size = options.chunk_size or chunk_size_of(work, options.limit(work.tokens.loss.device))
    for place, chunk in gradient_chunks(losses, work.params, work.tokens, method=method, chunk_size=size):
        for name, gradient in chunk.items():
            flat = gradient.reshape(len(gradient), -1)
            for half, projection in enumerate(halves[name]):
                found[name][half, place] = projection.of_gradients(flat).to(found[name].dtype)
    return found


def _difference(work: Workload, found: Rows, halves: Mapping[str, Halves]) -> str | None:
    """Where the rows do not add up to an ordinary gradient, in words; None where they do.

    Raises:
        ValueError: If a row is not finite.
    """
    weights = signed_sizes(work.num_tokens, seed=0)
    passes = passes_of(work)
    total = {name: torch.zeros_like(p) for name, p in work.params.items()}
    for one in passes.each:
        (gradient,) = weighted(one, work.params, weights[one.rows.cpu()][None].to(work.tokens.loss.device))
        total = {name: g + gradient[name] for name, g in total.items()}
    whole = torch.stack([torch.linalg.vector_norm(both).double() for both in found.values()]).square().sum().sqrt()
    for name, both in found.items():
        if not bool(both.isfinite().all()):
            raise ValueError(f"a gradient by {name!r} is not finite; check the model's weights and dtype")
        eps = torch.finfo(coarsest(work.nature.precision, work.params[name].dtype)).eps
        for half, projection in enumerate(halves[name]):
            expected = projection.of_gradients(total[name].flatten()[None])[0].to(both.dtype)
            off = torch.linalg.vector_norm(weights.to(both) @ both[half] - expected)
            size = torch.linalg.vector_norm(both[half]).maximum(torch.linalg.vector_norm(expected))
            if bool(off > eps**TOLERANCE * size + ROUNDING * eps * whole):  # a gradient may be zero, but for round-off
                return f"by {name!r} they differ by {float(off / size):.1e} of their size"
    return None
