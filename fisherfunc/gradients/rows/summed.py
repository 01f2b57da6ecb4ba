"""The unit "sequence": the loss of a sequence is the sum over its tokens, and so one row, and one backward pass.

A workload of sequences is one of tokens whose model takes (sequence, which of its tokens count) and whose loss is
`(b, 1)`, or `(b, T)` where a token has T targets: the sum over tokens of each. Nothing else of a pass knows of it. Axis
order: b sequences, s positions.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction, around
from fisherfunc.gradients.losses import TokenLoss, custom
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.grams.tokens import summed_tokens
from fisherfunc.records.axes import Batch


def summed(work: Workload) -> Workload:
    """The workload whose rows are the sequences: each has one loss, at position 0, the sum over its tokens of `work`.

    Args:
        work: The tokens, in the order of sequence and position, each with all of its rows.
    """
    counted = torch.zeros(
        len(work.sequences), int(work.tokens.position.max()) + 1, dtype=torch.bool, device=work.tokens.position.device
    )
    counted[work.tokens.sequence, work.tokens.position] = True
    tokens, _ = summed_tokens(work.tokens)
    return replace(
        work,
        fn=of_first(work.fn),
        sequences=work.sequences.beside(counted),
        loss=_summed_loss(work.loss, work.tokens.num_targets),
        tokens=replace(tokens, position=torch.zeros_like(tokens.position)),
    )


def of_first(fn: ModelFunction) -> ModelFunction:
    """The model as a function of (sequence, what only the loss knows)."""
    return replace(fn, call=around(fn.call, batch=lambda pair: pair[0]))


def _summed_loss(loss: TokenLoss, num_targets: int) -> TokenLoss:
    def values(output: Any, batch: tuple[Batch, Bool[Tensor, "b s"]]) -> Tensor:
        sequence, counted = batch
        each = loss.values(output, sequence).unflatten(1, (-1, num_targets))
        each = each.to(torch.promote_types(each.dtype, torch.float32))
        length = min(each.shape[1], counted.shape[1])  # beyond, nothing counts
        return torch.where(counted[:, :length, None], each[:, :length], 0.0).sum(dim=1)

    return replace(custom(values, name=loss.name), shift=loss.shift)
