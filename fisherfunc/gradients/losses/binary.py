"""Binary and multi-label classification: −log p(y) of independent Bernoulli variables, p = σ(f)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from fisherfunc.gradients.losses.token_losses import TokenLoss, _entry, _one_row_a_sample, logits_of
from fisherfunc.records.axes import Batch


def binary_classification() -> TokenLoss:
    """−log p(y) = Σ_j softplus(f_j) − y_j f_j of one or several logits with targets 0 or 1; a sample is a token.

    Several logits are several labels, independent of each other: the sum of their binary cross-entropies, where
    `torch.nn.BCEWithLogitsLoss()` takes their mean. Targets are `batch["labels"]`, of as many entries as the logits.
    """

    def targets(batch: Batch) -> Float[Tensor, "b 1 v"]:
        y = _one_row_a_sample(_entry(batch, "binary_classification", "labels", "targets"))
        return y if y.is_floating_point() else y.float()  # 0 and 1 are exact in any dtype

    def valid(batch: Batch) -> Bool[Tensor, "b 1"]:
        y = targets(batch)
        other = (y != 0) & (y != 1)
        if bool(other.any()):
            raise ValueError(
                f"binary_classification expected targets 0 or 1, got {y[other][0].item():g}; for labels in between "
                "pass loss=torch.nn.BCEWithLogitsLoss(), whose reduction says how several are taken together"
            )
        return torch.ones_like(y[..., 0], dtype=torch.bool)

    return TokenLoss(
        name="binary_classification",
        shift=0,
        distribution="bernoulli",
        predictions=lambda output, batch: _one_row_a_sample(logits_of(output)),
        targets=targets,
        valid=valid,
        negative_log_likelihood=lambda logits, y: binary_cross_entropy(logits, y).sum(dim=-1),
    )


def binary_cross_entropy(logits: Float[Tensor, "... v"], y: Float[Tensor, "... v"]) -> Float[Tensor, "... v"]:
    """−log p(y) of each logit, in float32 at least."""
    at_least_float32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.binary_cross_entropy_with_logits(at_least_float32, y.to(at_least_float32), reduction="none")
