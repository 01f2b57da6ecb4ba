"""Which tokens carry an eigenvector: those of the largest coefficients, with loss, target and text."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.losses import IGNORED, TokenLoss
from fisherfunc.gradients.rows.tokens import target_row, targets
from fisherfunc.linalg.grams.eigenpairs import Eigenpairs
from fisherfunc.records.axes import Batch

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class LeadingToken:
    """A token (or a sequence) and its part in an eigenvector; plain Python values.

    Attributes:
        vector: Which eigenvector, from 0.
        eigenvalue: Its λ.
        row: The row of the Grams.
        sequence: The index of its sequence, counted over all batches.
        position: Where in the sequence the prediction is made; −1 for a whole sequence.
        coefficient: u_n, see `Eigenpairs`.
        share: u_n², the share of λ that is due to it; the shares of all tokens sum to 1.
        loss: Its loss in nats.
        target: The id, or class, of its target; None where it has none, or the rows are sequences.
        text: The text of the target; None without a decoder, or where the model is no language model.
        before: The text before the target.
        after: The text after it.
    """

    vector: int
    eigenvalue: float
    row: int
    sequence: int
    position: int
    coefficient: float
    share: float
    loss: float
    target: int | None = None
    text: str | None = None
    before: str | None = None
    after: str | None = None


def leading_tokens(
    pairs: Eigenpairs,
    batch: Batch,
    loss: TokenLoss,
    *,
    top: int = 10,
    decode: Decode | None = None,
    window: int = 8,
) -> list[LeadingToken]:
    """The tokens of the largest coefficients of each eigenvector, largest first. No pass over the model.

    Args:
        pairs: The eigenpairs, or eigenvectors.
        batch: What the Grams are of.
        loss: Their loss.
        top: How many tokens of each eigenvector.
        decode: Ids → text, such as a tokenizer's `decode`; no text where None.
        window: How many tokens of text before and after.

    Raises:
        ValueError: If `top` or `window` is out of range, or the batch or loss is not that of the Grams.
    """
    if top < 1 or window < 0:
        raise ValueError(f"expected top >= 1 and window >= 0, got top={top}, window={window}")
    if pairs.provenance.loss not in (None, loss.name):
        raise ValueError(f"the eigenpairs are of the loss {pairs.provenance.loss!r}, got {loss.name!r}")
    order = pairs.coefficients.abs().argsort(dim=1, descending=True, stable=True)[:, :top].to(pairs.tokens.loss.device)
    found = [_token(pairs, vector, row) for vector, rows in enumerate(order.tolist()) for row in rows]
    if loss.distribution != "categorical" or found[0].position < 0:
        return found
    ids = targets(pairs.tokens.select(order.flatten()), batch, loss).tolist()
    found = [replace(token, target=target) for token, target in zip(found, ids, strict=True)]
    if decode is None:
        return found
    sequences = split(batch)
    return [_with_text(token, sequences[token.sequence], loss, decode, window) for token in found]


def _token(pairs: Eigenpairs, vector: int, row: int) -> LeadingToken:
    coefficient = pairs.coefficients[vector, row].item()
    return LeadingToken(
        vector=vector,
        eigenvalue=pairs.eigenvalues[vector].item(),
        row=row,
        sequence=int(pairs.tokens.sequence[row]),
        position=int(pairs.tokens.position[row]),
        coefficient=coefficient,
        share=coefficient**2,
        loss=pairs.tokens.loss[row].item(),
    )


def _with_text(token: LeadingToken, sequence: Batch, loss: TokenLoss, decode: Decode, window: int) -> LeadingToken:
    stream = _stream(sequence, loss)
    if stream is None or token.target is None:
        return token
    ids, there = stream
    place = token.position + loss.shift
    before, after = slice(max(0, place - window), place), slice(place + 1, place + 1 + window)
    return replace(
        token,
        before=decode(ids[before][there[before]].tolist()),
        text=decode([token.target]),
        after=decode(ids[after][there[after]].tolist()),
    )


def _stream(sequence: Batch, loss: TokenLoss) -> tuple[Tensor, Tensor] | None:
    """The ids of the text that targets are part of, and which of them are there; masked ones are filled in."""
    if loss.name not in ("causal_lm", "masked_lm", "seq2seq_lm") or not isinstance(sequence, dict):
        return None
    own = target_row(loss, sequence)
    if loss.name == "seq2seq_lm":
        return own, own != IGNORED
    if not isinstance(sequence.get("input_ids"), Tensor):
        return None
    ids = sequence["input_ids"][0]
    mask = sequence.get("attention_mask")
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[0].bool()
    filled = torch.where(own != IGNORED, own, ids[loss.shift :])
    return torch.cat([ids[: loss.shift], filled]), there
