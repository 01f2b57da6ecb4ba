"""Which token loss fits a model: by the class and configuration of a Transformers head, else by the batch's targets.

What fits two losses is no guess: it is an error that names both.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fisherfunc.gradients.losses import token_losses as losses
from fisherfunc.gradients.losses.binary import binary_classification
from fisherfunc.records.axes import Batch

_LANGUAGE_MODELS: tuple[tuple[str, Callable[[], losses.TokenLoss]], ...] = (
    ("ForMaskedLM", losses.masked_lm),
    ("ForCausalLM", losses.causal_lm),
    ("LMHeadModel", losses.causal_lm),
    ("ForTokenClassification", partial(losses.classification, class_axis=-1)),
    ("ForMultipleChoice", losses.classification),
    ("ForNextSentencePrediction", losses.classification),
)
_HEADS_OF_SAMPLES = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))
_PROBLEMS: dict[str, Callable[[], losses.TokenLoss]] = {
    "regression": losses.regression,
    "single_label_classification": losses.classification,
    "multi_label_classification": binary_classification,
}
_SUM_TO_ONE = 1e-3
"""How near to 1 the sum of probabilities is, which were rounded to bfloat16 or to three digits."""


def infer(model: Any, batch: Batch, output: Any = None) -> losses.TokenLoss:
    """The loss that a model was made for.

    Args:
        model: A module; heads of Transformers are recognised by their names, and those of samples (one or several
            labels, or a regression) by their configuration.
        batch: A batch, or a list of them. Where the model says nothing, integer targets mean classification and
            floats regression.
        output: What the model returns for a sample, where known: one logit with targets 0 or 1, or as many logits as
            there are such targets, are a binary classification.

    Raises:
        ValueError: If nothing fits, or two losses do; pass `loss=` then.

    Example:
        >>> import torch
        >>> infer(torch.nn.Linear(2, 3), (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))).name
        'classification'
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if name.endswith("ForConditionalGeneration"):
        return losses.seq2seq_lm() if getattr(config, "is_encoder_decoder", False) else losses.causal_lm()
    if name.endswith("WithLMHeadModel") and not getattr(config, "causal", True):  # XLM and Flaubert say it so
        return losses.masked_lm()
    for part, loss in _LANGUAGE_MODELS:
        if part in name:
            return loss()
    problem = getattr(config, "problem_type", None)
    if problem in _PROBLEMS:
        return _PROBLEMS[problem]()
    targets = targets_of(batch)
    if any(part in name for part in _HEADS_OF_SAMPLES):
        return _of_head(getattr(config, "num_labels", None), targets)
    if getattr(config, "is_encoder_decoder", False) and any(y.ndim == 2 and not y.is_floating_point() for y in targets):
        return losses.seq2seq_lm()
    if not targets or _of_text(batch, targets):
        raise ValueError(
            f"cannot tell which loss {name} was made for; pass loss=ff.losses.causal_lm() or masked_lm, seq2seq_lm, "
            "classification, binary_classification, regression, or custom(...)"
        )
    if any(y.is_floating_point() for y in targets):
        return _of_floats(targets)
    return binary_classification() if _is_binary(targets, output) else losses.classification()


def targets_of(batch: Batch) -> list[Tensor]:
    """The targets in a batch, or in each of a list of batches, where they are tensors."""
    if isinstance(batch, list):
        return [y for one in batch for y in targets_of(one)]
    if isinstance(batch, Mapping):
        entries = [batch.get("labels"), batch.get("targets")]
    else:
        entries = [batch[-1]] if isinstance(batch, tuple) and batch else []
    return [y for y in entries if isinstance(y, Tensor)][:1]


def zero_or_one(targets: Sequence[Tensor]) -> bool:
    """Whether all targets are 0 or 1."""
    return all(bool(((y == 0) | (y == 1)).all()) for y in targets)


def _of_head(num_labels: int | None, targets: list[Tensor]) -> losses.TokenLoss:
    """As Transformers reads a head of samples whose configuration names no problem."""
    if num_labels == 1:
        return losses.regression()
    if not any(y.is_floating_point() for y in targets):
        return losses.classification()
    if zero_or_one(targets):
        return binary_classification()
    raise ValueError(
        f"labels of dtype {targets[0].dtype} that are not all 0 or 1, for a classifier of {num_labels} labels, may be "
        "probabilities of classes or of each label; say which: loss=torch.nn.CrossEntropyLoss(), or "
        "torch.nn.BCEWithLogitsLoss(reduction='sum'); real values are loss=ff.losses.regression()"
    )


def _of_text(batch: Batch, targets: list[Tensor]) -> bool:
    """Whether targets are of the shape of ids: of the next tokens, of masked ones, or classes of each."""
    first = batch[0] if isinstance(batch, list) else batch
    ids = first.get("input_ids") if isinstance(first, Mapping) else None
    return isinstance(ids, Tensor) and ids.ndim > 1 and ids.shape == targets[0].shape


def _of_floats(targets: list[Tensor]) -> losses.TokenLoss:
    """Regression, but for targets that could be labels: nothing else would tell that they were taken otherwise."""
    if zero_or_one(targets) and any(bool(y.any()) for y in targets) and not all(bool(y.all()) for y in targets):
        raise ValueError(
            f"targets of dtype {targets[0].dtype} that are all 0 or 1 may be labels or real values; say which: "
            "loss=ff.losses.binary_classification() or ff.losses.regression() (one-hot classes: "
            "torch.nn.CrossEntropyLoss())"
        )
    if all(_sum_to_one(y) for y in targets):
        raise ValueError(
            f"targets of shape {tuple(targets[0].shape)} that sum to 1 may be probabilities of classes or real values; "
            "say which: loss=torch.nn.CrossEntropyLoss() or ff.losses.regression()"
        )
    return losses.regression()


def _sum_to_one(y: Tensor) -> bool:
    if y.ndim < 2 or y.shape[1] < 2:
        return False
    return bool((y >= 0).all()) and bool(((y.sum(dim=1) - 1).abs() <= _SUM_TO_ONE).all())


def _is_binary(targets: list[Tensor], output: Any) -> bool:
    """Whether a sample has one logit, or one for each of its targets, and these are 0 or 1."""
    if output is None or not zero_or_one(targets):
        return False
    shape, labels = losses.logits_of(output).shape, targets[0].shape
    of_one = shape[1:].numel() == labels[1:].numel() == 1 if labels else shape.numel() == 1  # a sample may have no axis
    each_a_label = len(shape) == 2 and shape[1:] == labels[1:]
    if each_a_label and all(_sum_to_one(y) for y in targets):
        raise ValueError(
            f"targets of shape {tuple(labels)} with a single 1 in each row may be one-hot classes, or labels of each "
            "logit; give class numbers, as by .argmax(dim=1), or say loss=ff.losses.binary_classification()"
        )
    return of_one or each_a_label
