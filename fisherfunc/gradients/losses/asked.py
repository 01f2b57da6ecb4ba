"""The token loss that a user asks for: one of ours, one of torch's, or a function of their own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fisherfunc.gradients.losses.binary import binary_classification
from fisherfunc.gradients.losses.infer import targets_of
from fisherfunc.gradients.losses.positions import position_regression, segmentation
from fisherfunc.gradients.losses.token_losses import (
    TokenLoss,
    causal_lm,
    classification,
    custom,
    masked_lm,
    regression,
    seq2seq_lm,
)
from fisherfunc.gradients.losses.torch_losses import of_torch
from fisherfunc.records.axes import Batch

AnyLoss = TokenLoss | Callable[[Any, Batch], Tensor]
"""A token loss, a loss of torch, or a function (output, batch) → losses."""
LOSSES = (
    causal_lm,
    masked_lm,
    seq2seq_lm,
    classification,
    binary_classification,
    position_regression,
    segmentation,
    regression,
)


def token_loss_of(loss: Any, batch: Batch) -> TokenLoss:
    """Read a loss as a token loss.

    Args:
        loss: What a user gives.
        batch: Whose targets say how one of torch's losses reads them.

    Raises:
        TypeError: If it is none of ours, none of torch's and no function.
        ValueError: If it is torch's, and its options make it no loss of a token.
    """
    if isinstance(loss, TokenLoss):
        return loss
    if loss in LOSSES:
        raise TypeError(f"loss={loss.__name__} is a factory; call it: loss=ff.losses.{loss.__name__}()")
    if isinstance(loss, type):
        raise TypeError(f"loss={loss.__name__} is a class; call it: loss={loss.__name__}()")
    found = of_torch(loss, targets_of(batch))
    if found is not None:
        return found
    if callable(loss):
        return custom(loss)
    names = [factory.__name__ for factory in LOSSES]
    said = f"the name {loss!r}: loss=ff.losses.{loss}()" if loss in names else f"{type(loss).__name__} {loss!r}"
    raise TypeError(
        f"loss expected one of ff.losses ({', '.join(f'{name}()' for name in names)}, custom(...)), a loss of torch, "
        f"or a function (output, batch) -> losses, got {said}; ff.losses.infer(model, batch) is what a model suggests"
    )
