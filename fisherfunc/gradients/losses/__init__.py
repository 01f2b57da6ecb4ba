"""Token losses, and which of them a model was made for."""

from fisherfunc.gradients.losses.binary import binary_classification
from fisherfunc.gradients.losses.infer import infer
from fisherfunc.gradients.losses.positions import position_regression, segmentation
from fisherfunc.gradients.losses.token_losses import (
    IGNORED,
    TokenLoss,
    causal_lm,
    classification,
    custom,
    each_alone,
    logits_of,
    masked_lm,
    regression,
    seq2seq_lm,
)

__all__ = [
    "IGNORED",
    "TokenLoss",
    "binary_classification",
    "causal_lm",
    "classification",
    "custom",
    "each_alone",
    "infer",
    "logits_of",
    "masked_lm",
    "position_regression",
    "regression",
    "segmentation",
    "seq2seq_lm",
]
