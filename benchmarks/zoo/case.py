"""What one row of the sweep is about: a model, a batch and the loss, ready to be differentiated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.tiny import FIRST_ID, LAST_ID

MOST_PARAMETERS = 3_000_000  # what is larger is no tiny model, and its float64 loop does not end in time


class NotTinyError(Exception):
    """A model that cannot be built tiny; the message says why."""


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode with noise in every parameter, so that nothing is zero or one by design.

    Attributes:
        model: The module.
        batch: Keyword arguments of its forward pass, with `labels`.
        loss: "causal_lm", "masked_lm", "seq2seq_lm" or "classification".
    """

    model: nn.Module
    batch: Mapping[str, Any]
    loss: str


def perturbed(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with noise in what is trained and in the statistics of its norms."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.mul_(1 + torch.rand_like(buffer))
    return model


def checked(model: nn.Module, most: int = MOST_PARAMETERS) -> nn.Module:
    """The model, if it is small: of at most so many parameters.

    Raises:
        NotTinyError: If it is not, or nothing in it is trained.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > most:
        raise NotTinyError(f"it has {count:,} parameters, more than {most:,}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NotTinyError("none of its parameters is trained")
    return model


def ids(*shape: int) -> Tensor:
    """Ordinary tokens."""
    return torch.randint(FIRST_ID, LAST_ID, shape)


def attention_mask(lengths: list[int], width: int) -> Tensor:
    """Right padding: (b, width), one where a token is."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
