"""The loss where none is given: inferred, and held against the model's own on a sequence of the batch.

A model that takes labels and returns a loss says itself what it was made for: the mean over the valid tokens of that
sequence, the labels of the others set to −100. The inferred loss has to have the same mean, up to the factor that a sum
over tokens or a mean over outputs is. Where the model has no such loss, or it cannot be computed, nothing is concluded.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherfunc.gradients import losses
from fisherfunc.gradients.autodiff.model_function import has_gradient
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.data.batches import TARGET_KEYS, cast
from fisherfunc.gradients.data.sequences import Sequences, split
from fisherfunc.gradients.losses import IGNORED, TokenLoss, infer
from fisherfunc.gradients.losses.infer import targets_of, zero_or_one
from fisherfunc.models.functionalize import functionalize
from fisherfunc.pipeline.inputs import input_dtype
from fisherfunc.records.axes import Batch

_MOST_LOOKED_AT = 16
"""Sequences among which one with a valid token is looked for."""
_ROUNDINGS = 8
"""Units in the last place, of the largest logit, by which two ways to take a softmax and a mean may differ."""


def inferred_loss(model: nn.Module, batch: Batch) -> TokenLoss:
    """The loss that a model was made for. Cost: at most three forward passes of one sequence, on private copies.

    Raises:
        ValueError: If nothing fits, two losses do, or the model's own loss is another than the one inferred.
    """
    inner = getattr(model, "_orig_mod", model)  # of a compiled one
    targets = targets_of(batch)
    bits = bool(targets) and not any(y.is_floating_point() for y in targets) and zero_or_one(targets)
    guess = infer(inner, batch, _output(inner, split(batch)[0]) if bits else None)
    key = _key_of_labels(inner)
    if targets and key is not None:
        _hold(guess, inner, split(batch), key)
    return guess


class _WithLabels(nn.Module):
    """A model that is called with all that it is given, where `functionalize` would leave the labels out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The model's output; a decoder reads the labels as `functionalize` and Transformers' collators have it."""
        shift_right = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift_right is not None and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(keywords):
            keywords = {**keywords, "decoder_input_ids": shift_right(labels=keywords["labels"])}
        return self.model(*arguments, **keywords)


def _hold(guess: TokenLoss, model: nn.Module, sequences: Sequences, key: str) -> None:
    """Raise where the model's own loss of the first sequence with a valid token has another mean."""
    first = (n for n in range(min(_MOST_LOOKED_AT, len(sequences))) if _num_valid(guess, sequences[n]))
    number = next(first, None)
    if number is None:
        return
    sequence = sequences[number]
    labels, output = _labels(guess, sequence), _output(model, sequence)
    if output is None or not _fits(guess, output, sequence):
        return
    own = _own_loss(model, sequence, key, labels)
    if own is None:
        return
    mean, allowed = _mean(guess, output, sequence), _allowed(guess, own, output, sequence)
    if any(abs(float(own) - factor * mean) <= allowed for factor in _factors(guess, output, sequence)):
        return
    others = (
        (losses.causal_lm(), losses.masked_lm()) if labels.ndim == 2 and guess.distribution == "categorical" else ()
    )
    same = [other.name for other in others if abs(float(own) - _mean(other, output, (labels,))) <= allowed]
    raise ValueError(
        f"the loss of {type(model).__name__} is inferred as ff.losses.{guess.name}(), whose mean over the "
        f"{_num_valid(guess, sequence)} valid token(s) of sequence {number} is {mean:.6g}; the model's own loss on "
        f"them is {float(own):.6g}{f', as ff.losses.{same[0]}() has it' if same else ''}. Say which is meant: "
        f"loss=ff.losses.{guess.name}(), or {f'ff.losses.{same[0]}()' if same else 'ff.losses.custom(...)'}"
    )


def _output(model: nn.Module, batch: Batch) -> Any:
    """What a private copy of a model returns; None where it fails, which the pass itself will say better."""
    fn = functionalize(model, parameters=lambda name: has_gradient(model.get_parameter(name)))
    like = next(iter(fn.params.values()))
    (batch,) = cast(batch, dtype=input_dtype(fn), device=like.device)
    try:
        with torch.no_grad():
            return fn.apply(fn.params, batch)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:
        return None


def _key_of_labels(model: nn.Module) -> str | None:
    """The argument of the forward pass that takes the labels."""
    accepted = inspect.signature(model.forward).parameters
    return next((key for key in TARGET_KEYS if key in accepted), None)


def _num_valid(loss: TokenLoss, sequence: Batch) -> int:
    valid = loss.valid(sequence)
    return 0 if valid is None else int(valid.sum())


def _labels(guess: TokenLoss, sequence: Batch) -> Tensor:
    """The labels of a sequence, −100 where they are the target of no valid token."""
    given = targets_of(sequence)[0]
    ids = guess.targets(sequence)
    if guess.distribution != "categorical" or ids is None:
        return given
    return functional.pad(ids.long(), (guess.shift, 0), value=IGNORED).reshape(given.shape)


def _own_loss(model: nn.Module, sequence: Batch, key: str, labels: Tensor) -> Tensor | None:
    """What the model returns as its loss of these labels; None where that is no finite number."""
    if isinstance(sequence, tuple):
        arguments, keywords = sequence[:-1], {}
    else:
        arguments, keywords = (), {name: value for name, value in sequence.items() if name not in TARGET_KEYS}
    output = _output(_WithLabels(model), {"arguments": arguments, "keywords": {**keywords, key: labels}})
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, tuple | list):
        numbers = [part for part in output if isinstance(part, Tensor) and part.ndim == 0]
        loss = numbers[0] if len(numbers) == 1 else None
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(loss.isfinite()):
        return None
    return loss


def _fits(guess: TokenLoss, output: Any, sequence: Batch) -> bool:
    """Whether predictions and targets are of shapes and numbers that go together; the pass says what does not."""
    predictions, targets = guess.predictions(output, sequence), guess.targets(sequence)
    assert targets is not None
    if guess.distribution != "categorical":
        return predictions.shape == targets.shape
    return predictions.shape[:-1] == targets.shape and int(targets.max()) < predictions.shape[-1]


def _mean(loss: TokenLoss, output: Any, sequence: Batch) -> float:
    """Over the valid tokens of a sequence."""
    values, valid = loss.values(output, sequence), loss.valid(sequence)
    return float(values[valid].mean())


def _factors(guess: TokenLoss, output: Any, sequence: Batch) -> list[float]:
    """What a mean over outputs, a square that is not halved, or a sum over tokens is to our mean."""
    count = guess.predictions(output, sequence).shape[-1]
    of_outputs = {"gaussian": (1.0, 2.0, 1 / count, 2 / count), "bernoulli": (1.0, 1 / count)}
    of_tokens = (1, _num_valid(guess, sequence))
    return [tokens * outputs for tokens in of_tokens for outputs in of_outputs.get(guess.distribution, (1.0,))]


def _allowed(guess: TokenLoss, own: Tensor, output: Any, sequence: Batch) -> float:
    """What rounding may do, in the dtype that the model's own loss is taken in: logits are the same ones."""
    predictions = guess.predictions(output, sequence)
    largest = float(predictions.abs().max())
    if guess.distribution == "gaussian":
        targets = guess.targets(sequence)
        assert targets is not None
        largest = max(largest, float(targets.abs().max())) ** 2
    coarse = max(torch.finfo(own.dtype).eps, torch.finfo(torch.float32).eps)
    return _ROUNDINGS * coarse * (abs(float(own)) + largest)
