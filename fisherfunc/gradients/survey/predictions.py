"""What a model predicts for some sequences, told apart: by the shape that the loss takes, and from other predictions.

It serves to find out how a batch is meant (readings.py, given_targets.py). Axis order: predictions `(b, s, …)`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.records.axes import Batch, Params

Predictions = Tensor | Exception


class Unusable(Exception):  # noqa: N818 (it is not raised)
    """The model gave an output, and the loss finds no predictions in it."""


def predicted(fn: ModelFunction, params: Params, batch: Batch, loss: TokenLoss) -> Predictions:
    """What the loss depends on the parameters through, or what the model, or the loss, raised."""
    with torch.no_grad():
        try:
            output = fn.apply(params, batch)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            return error
        try:
            found = loss.predictions(output, batch)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            return Unusable(f"the loss {loss.name!r} failed on the output with {type(error).__name__}: {error}")
    if found.ndim == 0:
        return Unusable(f"the loss {loss.name!r} has one value for all sequences")
    return found if found.is_floating_point() else found.double()


def variants(fn: ModelFunction) -> list[ModelFunction]:
    """The model without the targets, and with them where it takes them."""
    given = fn.given_targets
    if given is None or given is fn.call:
        return [fn]
    return [replace(fn, given_targets=None), replace(fn, call=given, given_targets=None)]


def fit(predictions: Predictions, sequence: Batch, loss: TokenLoss) -> bool:
    """Whether predictions of one sequence have the shape that the loss takes."""
    if isinstance(predictions, Exception):
        return False
    targets = loss.targets(sequence)
    if targets is None:
        return predictions.ndim == 2 and len(predictions) == 1
    classes = (predictions.shape[-1],) if loss.distribution == "categorical" else ()
    return predictions.shape == (*targets.shape, *classes)


def same(one: Predictions, other: Predictions) -> bool:
    """Whether two predictions agree well within what rounding does."""
    if isinstance(one, Exception) or isinstance(other, Exception) or one.shape != other.shape:
        return False
    tolerance = min(1e-3, torch.finfo(one.dtype).eps ** 0.6)
    size = float(one.nan_to_num(0.0, 0.0, 0.0).abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def outcome(predictions: Predictions) -> str:
    """What came of a forward pass, in words."""
    if isinstance(predictions, Exception):
        return str(predictions) if isinstance(predictions, Unusable) else f"{type(predictions).__name__}: {predictions}"
    return f"predictions of shape {tuple(predictions.shape)}"


def equal(one: Predictions, other: Predictions) -> bool:
    """Whether two predictions are bitwise the same: nothing but the targets is another."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return False
    return torch.equal(one.nan_to_num(), other.nan_to_num())
