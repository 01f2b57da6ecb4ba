"""Losses with a term at every position of an output: pixels of an image, steps of a series.

Axis order: b samples, s positions, v classes or values.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfunc.gradients.losses.masks import attended
from fisherfunc.gradients.losses.token_losses import TokenLoss, _entry, classification, half_square, logits_of
from fisherfunc.records.axes import Batch


def segmentation() -> TokenLoss:
    """Cross-entropy of the class of every position, classes on axis 1 as torch has them: logits `(b, v, …)`.

    Targets are `(b, …)`, −100 where a position does not count; a position is a token. It is
    `classification(class_axis=1)`: no shape is taken for another, and the true Fisher is that of every position.
    """
    return replace(classification(class_axis=1), name="segmentation")


def position_regression() -> TokenLoss:
    """½ ‖f_s(x) − y_s‖² at every position s: minus the log-likelihood of N(f_s, 1) less its constant; a token each.

    Outputs and targets are `(b, s)` or `(b, s, v)`; `attention_mask` says which positions count. `regression` takes all
    positions of a sample as one token.
    """

    def by_position(values: Tensor, what: str) -> Float[Tensor, "b s v"]:
        if values.ndim not in (2, 3):
            raise ValueError(
                f"position_regression expected {what} of shape (samples, positions) or (samples, positions, values), "
                f"got {tuple(values.shape)}; bring the positions onto axis 1, or take ff.losses.regression(), for "
                "which a sample is a token"
            )
        return values[..., None] if values.ndim == 2 else values

    def targets(batch: Batch) -> Float[Tensor, "b s v"]:
        y = by_position(_entry(batch, "position_regression", "labels", "targets"), "targets")
        return y if y.is_floating_point() else y.double()

    def valid(batch: Batch) -> Bool[Tensor, "b s"]:
        return attended(batch, "attention_mask", torch.ones_like(targets(batch)[..., 0], dtype=torch.bool))

    def negative_log_likelihood(means: Tensor, y: Tensor) -> Float[Tensor, "b s"]:
        if means.shape != y.shape:
            raise ValueError(
                f"position_regression expected outputs and targets of one shape, got {tuple(means.shape)} and "
                f"{tuple(y.shape)}; give a target for every position and value"
            )
        return half_square(means, y)

    return TokenLoss(
        name="position_regression",
        shift=0,
        distribution="gaussian",
        predictions=lambda output, batch: by_position(logits_of(output), "outputs"),
        targets=targets,
        valid=valid,
        negative_log_likelihood=negative_log_likelihood,
    )
