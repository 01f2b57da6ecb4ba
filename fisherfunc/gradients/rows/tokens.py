"""Masks of tokens for `TokenGrams.select`: the spectrum of a group of tokens is that of a submatrix of the Grams.

    groups = {"early": ff.tokens.by_position(grams, 0, 8), "late": ff.tokens.by_position(grams, 8, 64)}
    spectra = {name: ff.spectrum_of_grams(grams.select(mask)) for name, mask in groups.items()}

Axis order: rows `n`, those of the Grams.
"""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.losses import IGNORED, TokenLoss
from fisherfunc.linalg.grams.token_grams import TokenGrams, Tokens
from fisherfunc.records.axes import Batch

__all__ = ["by_loss_quantile", "by_position", "targets"]


def by_position(grams: TokenGrams, first: int, last: int | None = None) -> Bool[Tensor, " n"]:
    """The tokens that are predicted at positions `first` ≤ s < `last` of their sequence.

    Args:
        grams: The Grams of a pass.
        first: The first position.
        last: The position after the last one; to the end where None.

    Raises:
        ValueError: If the rows are sequences, which have no position, or the range is empty.
    """
    if grams.unit != "token":
        raise ValueError(f"by_position expected rows of unit 'token', got {grams.unit!r}, which have no position")
    if last is not None and not first < last:
        raise ValueError(f"by_position expected first < last, got first={first}, last={last}")
    mask = grams.tokens.position >= first
    return mask if last is None else mask & (grams.tokens.position < last)


def by_loss_quantile(grams: TokenGrams, low: int | float, high: int | float) -> Bool[Tensor, " n"]:
    """The tokens whose loss is between two quantiles: in the order of losses, places ⌈low·N⌉ to ⌈high·N⌉ − 1.

    Quantiles that follow each other share no token and leave none out; equal losses keep the order of the rows.

    Args:
        grams: The Grams of a pass.
        low: The lower quantile, 0 for the smallest loss.
        high: The upper quantile, 1 for the largest loss.

    Raises:
        ValueError: If not 0 ≤ low < high ≤ 1.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"by_loss_quantile expected 0 <= low < high <= 1, got low={low}, high={high}")
    loss = grams.tokens.loss
    first, last = math.ceil(low * len(loss)), math.ceil(high * len(loss))
    mask = torch.zeros_like(loss, dtype=torch.bool)
    mask[loss.argsort(stable=True)[first:last]] = True
    return mask


def targets(tokens: Tokens, batch: Batch, loss: TokenLoss) -> Int[Tensor, " n"]:
    """What each token's target is: its id, or its class. A mask of a class: `torch.isin(targets(…), ids)`.

    Args:
        tokens: Which token each row is: `grams.tokens`.
        batch: The batch, or list of batches, that the Grams are of.
        loss: Their loss.

    Raises:
        ValueError: If the loss has no such targets, the rows are sequences, or the batch has no target there.
    """
    if loss.distribution != "categorical":
        raise ValueError(f"loss {loss.name!r} has no target ids; its distribution is {loss.distribution!r}")
    if bool((tokens.position < 0).any()):
        raise ValueError("the rows are sequences, which have a target a token; expected rows of unit 'token'")
    sequences = split(batch)
    found: dict[int, Tensor] = {}
    for index in tokens.sequence.unique().tolist():
        if index >= len(sequences):
            raise ValueError(f"there is no sequence {index} in this batch of {len(sequences)}; give that of the Grams")
        found[index] = target_row(loss, sequences[index])
    places = zip(tokens.sequence.tolist(), tokens.position.tolist(), strict=True)
    ids = [int(found[s][p]) if p < len(found[s]) else IGNORED for s, p in places]
    if IGNORED in ids:
        row = ids.index(IGNORED)
        raise ValueError(
            f"this batch has no target at sequence {int(tokens.sequence[row])}, position {int(tokens.position[row])}; "
            "give the batch that the Grams are of"
        )
    return torch.tensor(ids, device=tokens.sequence.device)


def target_row(loss: TokenLoss, sequence: Batch) -> Int[Tensor, " s"]:
    """The target of each position of a one-sequence batch."""
    ids = loss.targets(sequence)
    assert ids is not None
    return ids[0]
