"""The dense route: the gradient matrix G is formed, and reduced to Grams slab by slab. The oracle of every other route.

K_p = G_p G_pᵀ is accumulated over tiles of columns, so N·P is never held when only Grams are asked for. Axis order:
rows `(n, p)`, Grams `(n, m)`, rows in the order of sequence and position.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherfunc.gradients.alone import ALONE, Alone
from fisherfunc.gradients.autodiff import pullback
from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint, stage_of
from fisherfunc.gradients.checks.certificate import certified
from fisherfunc.gradients.checks.sound import SoundPass
from fisherfunc.gradients.dense.slabs import DEFAULT_CHUNK, Columns, DensePlan, Footprint, cut
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.gradients.rows.gradient_rows import gradient_chunks, losses_of, raise_nonfinite
from fisherfunc.gradients.rows.subsample import EVERY, Coordinates
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.gradients.survey.prepare import prepared
from fisherfunc.linalg.gram import gram_of
from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.provenance import Provenance
from fisherfunc.runtime.memory import SavedBytes
from fisherfunc.runtime.precision import full_precision


@full_precision()
@torch.inference_mode(mode=False)
def per_token_gradients(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: AnyLoss,
    *,
    chunk_size: int | None = None,
    self_check: bool = True,
) -> dict[str, Tensor]:
    """Compute the gradient of every valid token's loss: G, one entry per parameter.

    Holds N · P numbers, which `token_grams` does not. Cost: one forward pass per sequence, one backward pass per token;
    the check takes one more pass of the batch and 2 N² P operations.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batch: A batch, or a list of them.
        loss: The token loss: one of `ff.losses`, a loss of torch, or a function (output, batch) → losses.
        chunk_size: Tokens per batched backward pass; it changes memory and time, not the result.
        self_check: Whether to hold the gradients against ordinary backward passes of the batch as it was given.

    Returns:
        `{name: (N, *shape)}`, rows in the order of sequence and position, in the dtype of the parameters.

    Raises:
        ValueError: If no token is valid, an option or a parameter is unusable, a loss or a gradient is not finite (the
            error names where), the samples of a batch depend on each other, or the check fails.

    Example:
        >>> import fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Linear(1, 1, bias=False))
        >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
        >>> rows = ff.per_token_gradients(fn, {"weight": torch.tensor([[3.0]])}, batch, ff.losses.regression())
        >>> rows["weight"].flatten()
        tensor([ 3., 12.])
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size expected at least 1, got chunk_size={chunk_size}")
    work = prepared(fn, params, batch, loss, checked=self_check).work
    params, tokens = work.params, work.tokens
    losses = losses_of(work.fn, params, work.sequences, work.loss)
    first = losses(int(tokens.sequence[0]))
    method = pullback.choose(first, params)
    chunk_size = DEFAULT_CHUNK if chunk_size is None else chunk_size
    chunks = [c for _, c in gradient_chunks(losses, params, tokens, method=method, chunk_size=chunk_size)]
    gradients = {name: torch.cat([chunk[name] for chunk in chunks]) for name in params}
    for name, gradient in gradients.items():
        raise_nonfinite(gradient.reshape(len(gradient), -1).isfinite().all(dim=1), tokens, name)
    if self_check:
        grams = {name: gram_of(gradient.reshape(len(gradient), -1)) for name, gradient in gradients.items()}
        done = SoundPass(rows=work, grams=grams, how=Provenance(route="dense"), num_tokens=work.num_tokens)
        certified(done, limit=PassOptions().limit(tokens.loss.device))
    return gradients


@dataclass(frozen=True, kw_only=True)
class DenseOutcome:
    """What a dense pass gave: unnormalised Grams, and how it was done."""

    grams: dict[str, Tensor]
    plan: DensePlan
    method: str


def dense_grams(
    work: Workload,
    options: PassOptions,
    *,
    coordinates: Coordinates = EVERY,
    checkpoint: Checkpoint = NOWHERE,
    note: str = "",
    company: Alone = ALONE,
) -> DenseOutcome:
    """The Grams of the tokens, {name: (N, N)}; a row that is not finite spoils its row and column only.

    Cost: one forward and N backward passes a slab, 2 N² P operations in the dtype of the Grams.

    Args:
        work: What to pass over.
        options: How.
        coordinates: The columns to keep.
        checkpoint: Where to keep the Grams after each slab, and the plan of a pass to go on with.
        note: What the checkpoint is to say of the pass.
        company: Who else passes over rows of their own.

    Raises:
        ValueError: If the memory limit is below the smallest chunk.
    """
    losses = losses_of(work.fn, work.params, work.sequences, work.loss)
    known = next((one for one in (checkpoint.plan, options.plan) if isinstance(one, DensePlan)), None)
    plan = company.agreed(lambda: known or plan_dense(work, options, coordinates=coordinates))
    checkpoint.begin(plan, note)
    count = work.num_tokens
    grams = {
        options.label(n): torch.zeros(count, company.columns(work), dtype=options.gram_dtype, device=p.device)
        for n, p in work.params.items()
    }
    methods: set[str] = set()
    for done, slab in enumerate(plan.slabs):
        some = {columns.name: work.params[columns.name] for columns in slab}
        method = pullback.choose(losses(int(work.tokens.sequence[0])), some) if count else "none"
        methods.add(method)
        finished = company.finished(checkpoint, done, next(iter(some.values())))
        if finished is not None:
            grams |= finished
            continue
        buffers = [some[columns.name].new_empty(count, columns.width) for columns in slab]
        for rows, chunk in gradient_chunks(losses, some, work.tokens, method=method, chunk_size=plan.chunk_size):
            for columns, buffer in zip(slab, buffers, strict=True):
                buffer[rows] = _columns_of(chunk[columns.name], columns, coordinates)
            del chunk  # or two would be held while the next one is computed
            if options.progress is not None:
                options.progress(done * count + rows.stop, len(plan.slabs) * count)
        company.taken(done)
        for columns, buffer in zip(slab, buffers, strict=True):
            company.add_rows(grams[options.label(columns.name)], buffer)
        checkpoint.write(stage_of(done), {label: grams[label] for label in {*map(options.label, some)}}, {})
    return DenseOutcome(grams=grams, plan=plan, method="+".join(sorted(methods)))


def _columns_of(gradient: Tensor, columns: Columns, coordinates: Coordinates) -> Tensor:
    flat = gradient.reshape(len(gradient), -1)
    if columns.name not in coordinates.index:
        return flat[:, columns.start : columns.stop]
    index = coordinates.index[columns.name][columns.start : columns.stop].to(flat.device)
    return flat[:, index] * coordinates.weight[columns.name]


def plan_dense(work: Workload, options: PassOptions, *, coordinates: Coordinates = EVERY) -> DensePlan:
    """The slabs of a dense pass, and what it needs. Cost: one forward pass.

    Args:
        work: What to pass over.
        options: How.
        coordinates: The columns to keep.

    Raises:
        ValueError: If the memory limit is below the smallest chunk.
    """
    leaves = pullback.leaves_of(work.params)
    with torch.enable_grad(), SavedBytes() as saved:
        losses = work.loss.values(work.fn.apply(leaves, work.largest), work.largest)
    del losses
    footprint = Footprint(
        num_tokens=work.num_tokens,
        itemsize=max(p.element_size() for p in leaves.values()),
        gram_itemsize=options.gram_dtype.itemsize,
        graph=saved.total,
        largest=max(work.num_params.values()),
        cotangent=3 * saved.largest,  # as measured on GPT-2: logits, their softmax, the cotangent
    )
    return cut(
        work.num_params,
        _num_columns(work.num_params, coordinates),
        footprint,
        memory_limit=options.limit(next(iter(leaves.values())).device),
        chunk_size=options.chunk_size,
        num_grams=len({*map(options.label, work.params)}),
    )


def _num_columns(num_params: Mapping[str, int], coordinates: Coordinates) -> dict[str, int]:
    return {name: len(coordinates.index.get(name, range(size))) for name, size in num_params.items()}
