"""One forward pass of every sequence, before any gradient: which tokens there are, and their losses.

Errors that a long run would meet late (no valid token, targets out of range, a loss that is not finite) are found here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.losses import IGNORED, TokenLoss
from fisherfunc.gradients.memory import SavedBytes
from fisherfunc.gradients.model_function import ModelFunction
from fisherfunc.gradients.pullback import leaves_of
from fisherfunc.gradients.sequences import Sequences
from fisherfunc.gradients.stacks import REFUSALS, neighbours
from fisherfunc.linalg.tokens import Tokens, concatenated
from fisherfunc.records.axes import Batch, Params

MOST_TOGETHER = 2048
FEWEST_TOGETHER = 16
BYTES_TOGETHER = 2**26
"""What sequences that run together would save for a backward pass, at most, with their predictions."""
PARTS = 8
"""How many random parts of a group run without each other, to see whether its sequences reach each other."""


def survey(
    fn: ModelFunction,
    params: Params,
    sequences: Sequences,
    loss: TokenLoss,
    *,
    drop_nonfinite: bool = False,
) -> tuple[Tokens, int]:
    """The valid tokens in order of sequence and position, and how many were dropped. Cost: two forward passes.

    Args:
        fn: The model.
        params: Where to evaluate it.
        sequences: One-sequence batches.
        loss: The token loss.
        drop_nonfinite: Whether to leave out tokens whose loss is not finite, rather than raise.

    Raises:
        ValueError: If no token is valid, shapes differ, a target is out of range, or a loss is not finite.
    """
    found = _surveyed(fn, params, sequences, loss)
    tokens = concatenated(found)
    if tokens.loss.numel() == 0:
        raise ValueError(
            f"no valid token in {len(sequences)} sequences: a token counts if its target is not -100 and its position "
            "and its target's position are attended to; a causal model needs at least two tokens a sequence"
        )
    return _finite(tokens, drop_nonfinite)


def _surveyed(fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss) -> list[Tokens]:
    """Sequence by sequence; many small ones of one shape together, where that gives the losses that each has alone."""
    found: list[Tokens] = []
    for group in neighbours(range(len(sequences)), sequences, _width(fn, params, sequences, loss)):
        together = _together(fn, params, sequences, loss, group) if len(group) >= FEWEST_TOGETHER else None
        each = (_tokens(fn, params, sequences[index], loss, index) for index in group)
        found += each if together is None else [together]
    return found


def _width(fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss) -> int:
    """How many sequences may run together, by what the largest would save if all parameters had gradients."""
    if len(sequences) < FEWEST_TOGETHER:
        return 1
    largest = sequences[max(range(len(sequences)), key=sequences.num_entries)]
    everything = {**fn.frozen, **fn.params, **params}
    leaves = leaves_of({name: p for name, p in everything.items() if p.is_floating_point()})
    try:
        with torch.enable_grad(), SavedBytes() as saved:
            predictions = loss.predictions(fn.apply(leaves, largest), largest)
    except REFUSALS:  # one at a time, which finds what is wrong, and where
        return 1
    del predictions
    return max(1, min(MOST_TOGETHER, BYTES_TOGETHER // max(saved.total, 1)))


def _together(
    fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss, group: Sequence[int]
) -> Tokens | None:
    """The tokens of a group from one pass; None where the first, the last, or a random part has other losses alone."""
    ends = [_tokens(fn, params, sequences[index], loss, index) for index in (group[0], group[-1])]
    try:
        values, valid, targets = _evaluated(fn, params, sequences.joined(group), loss, group[0])
        order = torch.randperm(len(group), generator=torch.Generator().manual_seed(group[0]), device="cpu")
        for part in order.tensor_split(PARTS):
            some = sequences.joined([group[i] for i in part.tolist()])
            alone, counted, _ = _evaluated(fn, params, some, loss, group[0])
            if len(values) != len(group) or not _same(alone[counted], values[part.to(values.device)][counted]):
                return None
    except REFUSALS:  # one at a time then, which finds what is wrong, and where
        return None
    if values.shape != valid.shape or len(values) != len(group):
        return None
    row, position = valid.nonzero().unbind(dim=1)
    sequence = torch.tensor(list(group), device=row.device)[row]
    target = None if targets is None else targets[row, position]
    same = all(_same(end.loss, values[at][valid[at]]) for at, end in zip((0, -1), ends, strict=True))
    return Tokens(sequence=sequence, position=position, loss=values[valid], target=target) if same else None


def _same(alone: Tensor, here: Tensor) -> bool:
    """Whether losses agree well within what rounding does."""
    tolerance = min(1e-3, torch.finfo(alone.dtype).eps ** 0.6)
    return alone.shape == here.shape and torch.allclose(alone, here, rtol=tolerance, atol=tolerance, equal_nan=True)


def _tokens(fn: ModelFunction, params: Params, batch: Batch, loss: TokenLoss, index: int) -> Tokens:
    """The tokens of one sequence."""
    values, valid, targets = _evaluated(fn, params, batch, loss, index)
    if values.shape != valid.shape or values.ndim != 2 or values.shape[0] != 1:
        raise ValueError(
            f"loss {loss.name!r} expected losses and mask of one shape (1, s) for sequence {index}, "
            f"got {tuple(values.shape)} and {tuple(valid.shape)}"
        )
    position = valid[0].nonzero().squeeze(-1)
    target = None if targets is None else targets[0, position]
    sequence = torch.full_like(position, index)
    return Tokens(sequence=sequence, position=position, loss=values[0, position], target=target)


def _evaluated(
    fn: ModelFunction, params: Params, batch: Batch, loss: TokenLoss, index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, which of them count, and the classes that are their targets."""
    with torch.no_grad():
        targets = loss.targets(batch)
        predictions = loss.predictions(_output(fn, params, batch, index), batch)
        _check(predictions, targets, loss, index)
        values = loss.negative_log_likelihood(predictions, targets)
    valid = loss.valid(batch)
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    classes = targets if loss.distribution == "categorical" else None
    return values, valid, classes


def _output(fn: ModelFunction, params: Params, sequence: Batch, index: int) -> Any:
    try:
        return fn.apply(params, sequence)
    except IndexError as error:
        raise ValueError(
            f"the model failed on sequence {index} with IndexError: {error}; an input id beyond the vocabulary, or a "
            "sequence longer than the position table, does this"
        ) from error


def _check(predictions: Tensor, targets: Tensor | None, loss: TokenLoss, index: int) -> None:
    if targets is None:
        return
    categorical = loss.distribution == "categorical"
    expected = (*targets.shape, predictions.shape[-1]) if categorical else tuple(targets.shape)
    if tuple(predictions.shape) != expected:
        raise ValueError(
            f"loss {loss.name!r}: sequence {index} has predictions of shape {tuple(predictions.shape)} and targets of "
            f"shape {tuple(targets.shape)}; expected predictions of shape {expected}"
        )
    if categorical:
        _check_range(targets, predictions.shape[-1], loss, index)


def _check_range(targets: Tensor, num_classes: int, loss: TokenLoss, index: int) -> None:
    if targets.is_floating_point():
        raise ValueError(f"loss {loss.name!r} expected class targets of an integer dtype, got {targets.dtype}")
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= num_classes))
    if bool(wrong.any()):
        position = int(wrong[0].nonzero()[0, 0])
        raise ValueError(
            f"target {int(targets[0, position])} at sequence {index}, position {position} is out of range: "
            f"expected 0 to {num_classes - 1}, or -100 for none"
        )


def _finite(tokens: Tokens, drop_nonfinite: bool) -> tuple[Tokens, int]:
    finite = tokens.loss.isfinite()
    dropped = int((~finite).sum())
    if dropped and not drop_nonfinite:
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"the loss is {tokens.loss[row].item()} at sequence {int(tokens.sequence[row])}, position "
            f"{int(tokens.position[row])} ({dropped} such tokens of {len(finite)}); "
            "drop_nonfinite=True leaves them out and counts them"
        )
    if dropped == len(finite):
        raise ValueError(f"the loss of all {dropped} tokens is not finite; check the model's weights and dtype")
    return tokens.select(finite.nonzero().squeeze(-1)), dropped
