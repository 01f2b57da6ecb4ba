"""Squared norms of per-token gradients, ‖g_n‖² = K_nn, without a Gram and without G: their mean is the trace of F."""

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff import pullback
from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.gradients.rows.gradient_rows import gradient_chunks, losses_of
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.rows.targets import Targets, chosen
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.gradients.survey.prepare import check_options, prepared
from fisherfunc.records.axes import Batch, Params, Progress
from fisherfunc.runtime.memory import SavedBytes
from fisherfunc.runtime.precision import full_precision

ANYTHING = 2**62
MOST_TOGETHER = 64
"""Tokens a batched backward pass: more were not faster on a CPU, and take more memory."""
COPIES = 3
"""Of the gradients of a chunk, with what a batched backward pass holds of them on its way."""


@full_precision()
@torch.inference_mode(mode=False)
def gradient_norms(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: AnyLoss,
    *,
    targets: Targets | None = None,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, " n"]:
    """Return ‖g_n‖² of every row of G, in float64; `.sum() / N` is tr F, exact but for the rounding of gradients.

    No Gram is made, and no more gradients are held than the memory limit has room for. They are formed, by batched
    backward passes, sequence by sequence: the factors that `token_grams` contracts have no sum of squares that is
    cheaper than a Gram of their own. Cost: one forward pass a sequence, one backward pass of the whole sequence and P
    numbers a token.

    Args:
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batch: A batch, a list of them, or what gives them one after the other, as of `fisher_spectrum`.
        loss: The token loss: one of `ff.losses`, a loss of torch, or a function (output, batch) → losses.
        targets: Which targets, as in `token_grams`; others than the observed ones give a token several rows.
        unit: What a row is: "token" or "sequence".
        num_tokens: At most this many tokens, picked by seed.
        seed: Of whatever is picked.
        memory_limit: In bytes, beyond the model; half of what is free where None.
        progress: Called with the rows done and their total.

    Returns:
        `(n,)`, in the order of the rows of `token_grams`.

    Raises:
        ValueError: If no token is valid, an option is out of range, a loss or a gradient is not finite, or the memory
            limit has no room for one gradient.

    Example:
        >>> import fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Linear(1, 1, bias=False))
        >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
        >>> gradient_norms(fn, {"weight": torch.tensor([[3.0]])}, batch, ff.losses.regression())
        tensor([  9., 144.], dtype=torch.float64)
    """
    check_options(num_tokens, None, memory_limit, "dense", unit)
    targets = chosen(targets, unit=unit)
    ready = prepared(fn, params, batch, loss, num_tokens=num_tokens, seed=seed)
    work = targets.rows(ready.work, PassOptions(memory_limit=ANYTHING))
    work = summed(work) if unit == "sequence" else work
    options = PassOptions(memory_limit=memory_limit)
    losses = losses_of(work.fn, work.params, work.sequences, work.loss)
    method = pullback.choose(losses(int(work.tokens.sequence[0])), work.params)
    chunk_size = chunk_size_of(work, options.limit(work.tokens.loss.device))
    found = torch.zeros(work.num_tokens, dtype=torch.float64, device=work.tokens.loss.device)
    for rows, chunk in gradient_chunks(losses, work.params, work.tokens, method=method, chunk_size=chunk_size):
        for gradient in chunk.values():
            each = gradient.reshape(len(gradient), -1)
            found[rows] += torch.linalg.vector_norm(each, dim=1, dtype=torch.float64).square()
        del chunk, gradient, each
        if progress is not None:
            progress(rows.stop, work.num_tokens)
    if not bool(found.isfinite().all()):
        row = int((~found.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"the gradient of sequence {int(work.tokens.sequence[row])}, position {int(work.tokens.position[row])} is "
            f"not finite ({int((~found.isfinite()).sum())} of {len(found)} rows); check the model's weights and dtype"
        )
    return found


def chunk_size_of(work: Workload, limit: int) -> int:
    """How many gradients are formed together."""
    leaves = pullback.leaves_of(work.params)
    with torch.enable_grad(), SavedBytes() as saved:
        losses = work.loss.values(work.fn.apply(leaves, work.largest), work.largest)
    del losses
    size = sum(p.numel() * p.element_size() for p in leaves.values())
    one = COPIES * size + saved.total
    most = (limit - saved.total) // one
    if most < 1:
        raise ValueError(
            f"memory_limit={limit} has no room for the gradient of one token, about {one + saved.total} bytes; give "
            "more, or fewer parameters"
        )
    return min(most, MOST_TOGETHER)
