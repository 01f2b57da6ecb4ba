"""Which token loss fits a model: from the name of a Transformers class, else from the dtype of the targets."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fisherfunc.gradients.losses import token_losses as losses
from fisherfunc.records.axes import Batch

_BY_CLASS_NAME: tuple[tuple[str, Callable[[], losses.TokenLoss]], ...] = (
    ("ForMaskedLM", losses.masked_lm),
    ("ForSequenceClassification", losses.classification),
    ("ForImageClassification", losses.classification),
    ("ForTokenClassification", losses.classification),
    ("ForCausalLM", losses.causal_lm),
    ("LMHeadModel", losses.causal_lm),
)


def infer(model: Any, batch: Batch) -> losses.TokenLoss:
    """The loss that a model was made for.

    Args:
        model: A module; Transformers classes are recognised by their names.
        batch: A batch, or a list of them. In a tuple, integer targets mean classification and floats regression.

    Raises:
        ValueError: If nothing fits; pass `loss=` then.

    Example:
        >>> import torch
        >>> infer(torch.nn.Linear(2, 3), (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))).name
        'classification'
    """
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return losses.seq2seq_lm() if encoder_decoder else losses.causal_lm()
    for part, loss in _BY_CLASS_NAME:
        if part in name:
            return loss()
    first = batch[0] if isinstance(batch, list) and batch else batch
    if isinstance(first, tuple) and isinstance(first[-1], Tensor):
        return losses.regression() if first[-1].is_floating_point() else losses.classification()
    raise ValueError(
        f"cannot tell which loss {name} was made for; pass loss=ff.losses.causal_lm() or masked_lm, seq2seq_lm, "
        "classification, regression, or custom(...)"
    )
