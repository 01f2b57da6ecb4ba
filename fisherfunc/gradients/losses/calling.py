"""A loss function of the user's own, called a sample at a time; what it raises or returns instead is named."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fisherfunc.records.axes import Batch
from fisherfunc.records.containers import flattened, mapped
from fisherfunc.runtime.draws import same_draws

_RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
_ALONE = (
    "losses are taken a sample at a time, so a call has a batch axis of length 1; where a loss is of a pair or group, "
    "give that an axis of its own, (pairs, 2, ...)"
)
_CALLED = "loss(output, batch), with the batch as it was given, a mapping or a tuple (*inputs, targets)"


class LossError(ValueError, RuntimeError):
    """What a loss function raised, in our words; a RuntimeError too, after which a pass tries its next way to batch."""


def per_token(values: Callable[[Any, Batch], Tensor], name: str) -> Callable[[Any, Batch], Float[Tensor, "b s"]]:
    """The function with a loss a token as `(b, s)`, and errors that say what was expected.

    Args:
        values: (output, batch) → losses `(b,)` or `(b, s)`.
        name: What errors call it.
    """

    def called(output: Any, batch: Batch) -> Tensor:
        try:
            with same_draws(_device_of(output)):
                own = copy.deepcopy(values) if isinstance(values, nn.Module) else values  # it may keep what it saw
                losses = own(output, mapped(_copied, batch))
        except (LossError, torch.OutOfMemoryError):
            raise
        except _RAISED as error:
            raise LossError(
                f"loss {name!r} failed on one sample ({type(error).__name__}: {error}): {_ALONE}. It is called as "
                f"{_CALLED}, and returns losses (b,) or (b, s)"
            ) from error
        return _checked(losses, name)

    return called


def mask_per_token(valid: Callable[[Batch], Tensor], name: str) -> Callable[[Batch], Bool[Tensor, "b s"]]:
    """The function with a boolean a token as `(b, s)`, and an error for what is no mask.

    Args:
        valid: batch → a mask, `(b,)` or `(b, s)`, of booleans or of 0 and 1.
        name: What errors call the loss that it is of.
    """

    def called(batch: Batch) -> Tensor:
        mask = valid(mapped(_copied, batch))
        if not isinstance(mask, Tensor) or mask.ndim not in (1, 2):
            shown = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"valid of loss {name!r} expected to return a tensor of booleans (b,) or (b, s), got {shown}"
            )
        chosen = mask != 0
        if not torch.equal(chosen.to(mask.dtype), mask):
            raise ValueError(
                f"valid of loss {name!r} expected booleans, or 0 and 1, got {mask[chosen & (mask != 1)][0].item():g}; "
                "positions go as a mask, and weights into the loss itself"
            )
        return chosen[:, None] if chosen.ndim == 1 else chosen

    return called


def _device_of(output: Any) -> torch.device:
    """Where the predictions lie; the CPU where nothing is seen of that."""
    return next((leaf.device for _, leaf in flattened(output) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _copied(leaf: Any) -> Any:
    """What a loss may write to: the batch is the user's."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _checked(losses: Any, name: str) -> Tensor:
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"loss {name!r} expected to return a tensor of losses (b,) or (b, s), got {type(losses).__name__}"
        )
    if losses.ndim == 0:
        raise ValueError(
            f"loss {name!r} returned one number, reduced over tokens; expected losses (b,) or (b, s), as reduction="
            "'none' gives, for their gradients are taken one by one. torch's own losses may be passed as they are, "
            "such as loss=torch.nn.CrossEntropyLoss()"
        )
    if losses.ndim > 2:
        raise ValueError(
            f"loss {name!r} returned losses of shape {tuple(losses.shape)}; expected (b,) or (b, s): sum over the axes "
            "that are one token's, and join those of positions"
        )
    if losses.numel() == 0:
        raise ValueError(f"loss {name!r} returned no loss, shape {tuple(losses.shape)}: {_ALONE}")
    return losses[:, None] if losses.ndim == 1 else losses
