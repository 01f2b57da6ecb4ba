"""Token losses: ℓ_n = −log p(target_n | context), one per valid token, in nats; never a mean over tokens.

A `TokenLoss` is pure functions of the model's output and the batch. Axis order: predictions `(b, s, v)`, targets
`(b, s)` or `(b, s, v)`, losses `(b, s)`; position s is where the prediction is made. A token is valid if its target
is not −100 and both its position and its target's position are attended to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional

from fisherfunc.gradients.data.batches import by_name
from fisherfunc.gradients.losses.calling import mask_per_token, per_token
from fisherfunc.gradients.losses.class_axis import classes_last
from fisherfunc.gradients.losses.masks import attended
from fisherfunc.records.axes import Batch

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """One loss a token, as pure functions.

    Attributes:
        name: The name that results carry.
        shift: How far ahead of its position a token's target lies.
        distribution: "categorical", "bernoulli", "gaussian" or "custom".
        predictions: (output, batch) → `(b, s, …)`, what the loss depends on the parameters through.
        targets: batch → `(b, s, …)`; ids are −100 at invalid tokens.
        valid: batch → `(b, s)`; None where every loss counts.
        negative_log_likelihood: (predictions, targets) → `(b, s)`.
        each_alone: Whether each sample alone is meant, though the samples of a batch depend on each other.
    """

    name: str
    shift: int
    distribution: str
    predictions: Callable[[Any, Batch], Tensor]
    targets: Callable[[Batch], Tensor | None]
    valid: Callable[[Batch], Bool[Tensor, "b s"] | None]
    negative_log_likelihood: Callable[[Tensor, Any], Float[Tensor, "b s"]]
    each_alone: bool = False

    def values(self, output: Any, batch: Batch) -> Float[Tensor, "b s"]:
        """The loss of every position; entries at invalid tokens mean nothing."""
        return self.negative_log_likelihood(self.predictions(output, batch), self.targets(batch))


def causal_lm() -> TokenLoss:
    """Cross-entropy of the token at s + 1 predicted from position s: the shift happens here, once.

    Targets are `batch["labels"]`, or `batch["input_ids"]` where there are none. A token is valid if its target is
    not −100 and `attention_mask` is set at s and at s + 1.
    """

    def targets(batch: Batch) -> Tensor:
        ids = _ids(batch, "causal_lm", "labels", "targets", "input_ids")
        mask = attended(batch, "attention_mask", ids)
        return torch.where(mask[:, :-1] & mask[:, 1:], ids[:, 1:], IGNORED)

    return _categorical("causal_lm", targets, lambda output, batch: logits_of(output)[:, :-1], shift=1)


def masked_lm() -> TokenLoss:
    """Cross-entropy at the positions where `batch["labels"]` is not −100 and `attention_mask` is set."""

    def targets(batch: Batch) -> Tensor:
        ids = _ids(batch, "masked_lm", "labels", "targets")
        return torch.where(attended(batch, "attention_mask", ids), ids, IGNORED)

    return _categorical("masked_lm", targets, lambda output, batch: logits_of(output))


def seq2seq_lm() -> TokenLoss:
    """Cross-entropy of the decoder's targets `batch["labels"]`, where not −100 and `decoder_attention_mask` is set.

    `attention_mask` belongs to the encoder and says nothing about the targets.
    """

    def targets(batch: Batch) -> Tensor:
        ids = _ids(batch, "seq2seq_lm", "labels", "targets")
        return torch.where(attended(batch, "decoder_attention_mask", ids), ids, IGNORED)

    return _categorical("seq2seq_lm", targets, lambda output, batch: logits_of(output))


def classification(*, class_axis: int | None = None) -> TokenLoss:
    """Cross-entropy of a class: a sample `(b, v)` is one token; with positions, each of them is.

    Logits of positions, or of an image's pixels, are `(b, …, v)` or torch's `(b, v, …)`, as the labels `(b, …)` tell.
    `attention_mask` counts where samples have several positions.

    Args:
        class_axis: The axis of the logits that holds the classes; to be given where there are as many classes as
            positions, and the shapes fit both.
    """

    def labels(batch: Batch) -> Tensor:
        return _classes(batch, "classification", "labels", "targets")

    def targets(batch: Batch) -> Tensor:
        ids = labels(batch)
        if ids.ndim == 1:
            return ids[:, None]
        return torch.where(attended(batch, "attention_mask", ids), ids, IGNORED).flatten(1)

    def predictions(output: Any, batch: Batch) -> Tensor:
        return classes_last(logits_of(output), tuple(labels(batch).shape), class_axis)

    return _categorical("classification", targets, predictions)


def regression() -> TokenLoss:
    """½ ‖f(x) − y‖², minus the log-likelihood of a Gaussian of unit variance less its constant; a sample is a token."""

    def targets(batch: Batch) -> Tensor:
        y = _one_row_a_sample(_entry(batch, "regression", "labels", "targets"))
        return y if y.is_floating_point() else y.double()  # counts and years, whichever dtype they came in

    def predictions(output: Any, batch: Batch) -> Tensor:
        return _one_row_a_sample(logits_of(output))

    return TokenLoss(
        name="regression",
        shift=0,
        distribution="gaussian",
        predictions=predictions,
        targets=targets,
        valid=lambda batch: torch.ones_like(targets(batch)[..., 0], dtype=torch.bool),
        negative_log_likelihood=half_square,
    )


def custom(
    values: Callable[[Any, Batch], Tensor],
    *,
    valid: Callable[[Batch], Tensor] | None = None,
    name: str | None = None,
) -> TokenLoss:
    """A loss of your own.

    Args:
        values: (output, batch) → losses `(b,)` or `(b, s)`, not reduced over tokens.
        valid: batch → a mask of the same shape, booleans or 0 and 1; every loss counts where None.
        name: The name that results carry; the function's where None.
    """
    name = name or str(getattr(values, "__name__", type(values).__name__))

    return TokenLoss(
        name=name,
        shift=0,
        distribution="custom",
        predictions=per_token(values, name),
        targets=lambda batch: None,
        valid=lambda batch: None if valid is None else mask_per_token(valid, name)(batch),
        negative_log_likelihood=lambda losses, _: losses,
    )


def each_alone(loss: TokenLoss) -> TokenLoss:
    """Say that the loss of each sample alone is meant, though in a batch the samples depend on each other.

    In-batch negatives, losses normalised over the batch or statistics of the batch make the loss of a sample another
    one where it is alone. Gradients per token are those of each sample alone; without this such a batch is refused.

    Args:
        loss: Any token loss.
    """
    return replace(loss, each_alone=True)


def logits_of(output: Any) -> Tensor:
    """The predictions in a model's output: a tensor, its `.logits`, its entry "logits", or its first element.

    A number that comes first in a tuple, as in (loss, logits), is passed over: predictions have an axis of samples.

    Raises:
        TypeError: If there are none.
        ValueError: If all there is, is a number: a loss, reduced already.
    """
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif isinstance(getattr(output, "logits", None), Tensor):
        found = output.logits
    elif isinstance(output, tuple | list):
        found = next((part for part in output if not _is_number(part)), output[0] if output else output)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"expected a tensor or an output with `logits`, got {type(found).__name__}; a model without a head has no "
            "loss: load it with one, or pass loss=ff.losses.custom(...)"
        )
    if found.ndim == 0:
        raise ValueError(
            "the model returns one number, a loss that is reduced over tokens, and no predictions; return the logits, "
            "or one loss a sample with loss=ff.losses.custom(lambda output, batch: output)"
        )
    return found


def _is_number(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 0


def _categorical(
    name: str, targets: Callable[[Batch], Tensor], predictions: Callable[[Any, Batch], Tensor], shift: int = 0
) -> TokenLoss:
    return TokenLoss(
        name=name,
        shift=shift,
        distribution="categorical",
        predictions=predictions,
        targets=targets,
        valid=lambda batch: targets(batch) != IGNORED,
        negative_log_likelihood=_cross_entropy,
    )


def half_square(means: Float[Tensor, "b s v"], y: Float[Tensor, "b s v"]) -> Float[Tensor, "b s"]:
    """½ ‖f − y‖², in float32 at least: of targets that are large beside their spread, a coarser dtype has none."""
    at_least_float32 = means.to(torch.promote_types(means.dtype, torch.float32))
    return (at_least_float32 - y.to(at_least_float32)).square().sum(dim=-1) / 2


def _cross_entropy(logits: Float[Tensor, "b s v"], targets: Tensor) -> Float[Tensor, "b s"]:
    at_least_float32 = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(at_least_float32.mT, targets.long(), reduction="none", ignore_index=IGNORED)


def _one_row_a_sample(values: Tensor) -> Shaped[Tensor, "b 1 v"]:
    return values.reshape(values.shape[0], 1, -1)


def _entry(batch: Batch, loss: str, *keys: str) -> Tensor:
    named = by_name(batch)
    if named is None:
        return _tensor(batch[-1], loss, "targets")
    for key in keys:
        if named.get(key) is not None:
            return _tensor(named[key], loss, key)
    raise ValueError(f"{loss} expected {' or '.join(map(repr, keys))} in the batch, got keys {sorted(named)}; add one")


def _tensor(targets: Any, loss: str, key: str) -> Tensor:
    if isinstance(targets, Tensor):
        return targets
    raise TypeError(f"{loss} expected {key} as a tensor of numbers, a row a sequence, got {type(targets).__name__}")


def _classes(batch: Batch, loss: str, *keys: str) -> Tensor:
    """Targets as int64, in which −100 is no class, whatever they are given in."""
    given = _entry(batch, loss, *keys)
    if given.is_floating_point() and not bool((given == given.round()).all()):
        raise ValueError(
            f"loss {loss!r} expected class targets, which are integers, got {given.dtype} of shape "
            f"{tuple(given.shape)} with fractions. Probabilities of classes are taken by "
            "loss=torch.nn.CrossEntropyLoss(), labels 0 or 1 of several logits by ff.losses.binary_classification(), "
            "real values by ff.losses.regression()"
        )
    return given.long()


def _ids(batch: Batch, loss: str, *keys: str) -> Tensor:
    ids = _classes(batch, loss, *keys)
    if ids.ndim != 2:
        raise ValueError(f"{loss} expected targets of shape (sequences, positions), got {tuple(ids.shape)}")
    return ids
