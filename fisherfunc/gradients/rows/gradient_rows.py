"""Rows of the gradient matrix, a chunk of tokens at a time: row n is g_n = ∇_θ ℓ_n.

One forward pass a sequence, one batched backward pass a chunk of its tokens. Axis order: `{name: (c, *shape)}`, rows
in the order of sequence and position.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

from jaxtyping import Bool, Float
from torch import Tensor

from fisherfunc.gradients.autodiff import pullback
from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.linalg.grams.token_grams import Tokens
from fisherfunc.records.axes import Params


def gradient_chunks(
    losses: Callable[[int], pullback.LossesOf], params: Params, tokens: Tokens, *, method: str, chunk_size: int
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The gradients of the tokens by `params`, a chunk of one sequence's tokens at a time.

    Args:
        losses: A sequence → parameters → its losses.
        params: Where to differentiate, and by what.
        tokens: The tokens wanted, in the order of sequence and position.
        method: A key of `pullback.METHODS`.
        chunk_size: Tokens a batched backward pass.

    Yields:
        The rows that a chunk fills, and `{name: (c, *shape)}`.
    """
    for first, last in runs(tokens.sequence) if len(tokens.sequence) else ():  # a rank may have none
        chunks = [slice(start, min(start + chunk_size, last)) for start in range(first, last, chunk_size)]
        losses_here = losses(int(tokens.sequence[first]))
        values, pull, gradients = _begun(method, losses_here, params, tokens.entry[chunks[0]])
        yield chunks[0], gradients
        del gradients  # or two chunks would be held while the next one is computed
        for rows in chunks[1:]:
            yield rows, pull(one_hot(tokens.entry[rows], values))


def _begun(
    method: str, losses_of: pullback.LossesOf, params: Params, entry: Tensor
) -> tuple[Tensor, pullback.Pullback, dict[str, Tensor]]:
    """The losses, their pullback and the gradients at some entries, by the first method that this sequence takes."""
    methods = list(pullback.METHODS)
    for name in methods[methods.index(method) :]:
        try:
            values, pull = pullback.METHODS[name](losses_of, params)
            return values, pull, pull(one_hot(entry, values))
        except RuntimeError:  # a rule that the probed sequence did not need; the last method is ordinary autograd
            if name == methods[-1]:
                raise
    raise AssertionError("the last method either returns or raises")


def losses_of(
    fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss
) -> Callable[[int], pullback.LossesOf]:
    """A sequence → a function of some of the parameters (the others stay where they are) to its losses `(s,)`."""

    def of(number: int) -> pullback.LossesOf:
        sequence = sequences[number]
        return lambda some: loss.values(fn.apply({**params, **some}, sequence), sequence)[0]

    return of


def raise_nonfinite(finite: Bool[Tensor, " n"], tokens: Tokens, name: str, *, of: str = "parameter") -> None:
    """Raise a ValueError that names the first token whose gradient by a parameter is not finite, if there is one."""
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0, 0])
    position = int(tokens.position[row])
    where = f"sequence {int(tokens.sequence[row])}{f', position {position}' if position >= 0 else ''}"
    kind = "tokens" if position >= 0 else "sequences"
    raise ValueError(
        f"the gradient of {where} by {of} {name!r} is not finite ({int((~finite).sum())} such "
        f"{kind if tokens.draw is None else 'rows'} of {len(finite)}); drop_nonfinite=True in token_grams or "
        "fisher_spectrum leaves out such tokens and counts them"
    )


def runs(sequence: Tensor) -> Iterator[tuple[int, int]]:
    """The bounds of the runs of equal sequence numbers."""
    starts = (sequence.diff() != 0).nonzero().squeeze(-1) + 1
    bounds = [0, *starts.tolist(), len(sequence)]
    return pairwise(bounds)


def one_hot(entry: Tensor, values: Float[Tensor, " s"]) -> Float[Tensor, "c s"]:
    """One cotangent a token: 1 at its own loss."""
    cotangents = values.new_zeros(len(entry), len(values))
    return cotangents.scatter_(1, entry[:, None].to(values.device), 1.0)
