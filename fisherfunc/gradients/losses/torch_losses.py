"""torch's own losses, token by token: `torch.nn.CrossEntropyLoss()`, `F.mse_loss`, `partial(F.huber_loss, delta=2.0)`.

Of cross_entropy, nll_loss and multi_margin_loss a token is a target, its loss what reduction="none" gives: weighted,
and not divided by the weights of a batch; classes lie on axis 1, as torch has them. Of all others a token is a sample
with all its outputs, its loss torch's own of that sample alone: the mean over outputs, or the sum, as `reduction` says.
So `MSELoss()` is 2/d times `ff.losses.regression()` for d outputs, and `MSELoss(reduction="sum")` twice it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherfunc.gradients.losses.binary import binary_classification
from fisherfunc.gradients.losses.calling import LossError
from fisherfunc.gradients.losses.infer import zero_or_one
from fisherfunc.gradients.losses.token_losses import IGNORED, TokenLoss, _entry, classification, logits_of
from fisherfunc.records.axes import Batch
from fisherfunc.records.hashing import short_hash

Function = Callable[..., Tensor]

_OF_CLASSES: dict[Function, tuple[str, ...]] = {
    functional.cross_entropy: ("weight", "ignore_index", "label_smoothing"),
    functional.nll_loss: ("weight", "ignore_index"),
    functional.multi_margin_loss: ("p", "margin", "weight"),
}
_OF_SAMPLES: dict[Function, tuple[str, ...]] = {
    functional.mse_loss: (),
    functional.l1_loss: (),
    functional.smooth_l1_loss: ("beta",),
    functional.huber_loss: ("delta",),
    functional.binary_cross_entropy: ("weight",),
    functional.binary_cross_entropy_with_logits: ("weight", "pos_weight"),
    functional.poisson_nll_loss: ("log_input", "full", "eps"),
    functional.kl_div: ("log_target",),
    functional.soft_margin_loss: (),
    functional.hinge_embedding_loss: ("margin",),
    functional.multilabel_margin_loss: (),
    functional.multilabel_soft_margin_loss: ("weight",),
}
_MODULES: dict[type[nn.Module], Function] = {
    nn.CrossEntropyLoss: functional.cross_entropy,
    nn.NLLLoss: functional.nll_loss,
    nn.MultiMarginLoss: functional.multi_margin_loss,
    nn.MSELoss: functional.mse_loss,
    nn.L1Loss: functional.l1_loss,
    nn.SmoothL1Loss: functional.smooth_l1_loss,
    nn.HuberLoss: functional.huber_loss,
    nn.BCELoss: functional.binary_cross_entropy,
    nn.BCEWithLogitsLoss: functional.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: functional.poisson_nll_loss,
    nn.KLDivLoss: functional.kl_div,
    nn.SoftMarginLoss: functional.soft_margin_loss,
    nn.HingeEmbeddingLoss: functional.hinge_embedding_loss,
    nn.MultiLabelMarginLoss: functional.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: functional.multilabel_soft_margin_loss,
}
_PLAIN = {"weight": None, "pos_weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0}
"""What options are where they change nothing."""
_SHOWN = 8
"""Entries of a weight that a name shows; a longer one goes by its hash."""


def of_torch(loss: Any, targets: Sequence[Tensor]) -> TokenLoss | None:
    """The token loss that one of torch's losses is; None where it is none of torch's.

    Args:
        loss: A module, a function, or a `functools.partial` of one.
        targets: Those of the batch: whether classes are given by number or by probability is theirs to say.

    Raises:
        TypeError: If it is torch's, and no loss of a token.
        ValueError: If its options make it none.
    """
    found = _function(loss)
    if found is None:
        return None
    function, options = found
    known = {**_OF_CLASSES, **_OF_SAMPLES}
    if function not in known or not set(options) <= {*known[function], "reduction"}:
        unknown = sorted(set(options) - {*known.get(function, ()), "reduction"})
        raise TypeError(
            f"loss={_called(loss)}{f' with {unknown}' if function in known else ''} is none that fisherfunc can take "
            "token by token; pass loss=ff.losses.custom(lambda output, batch: ...), which returns the losses of the "
            "samples, (b,) or (b, s), reduced by nothing"
        )
    reduction = options.pop("reduction", "mean")
    if function in _OF_CLASSES:
        return _of_classes(function, options, soft=any(y.is_floating_point() for y in targets))
    return _of_samples(function, options, reduction, targets)


def _function(loss: Any) -> tuple[Function, dict[str, Any]] | None:
    """The function that it is, and its options; None where it is not torch's."""
    if isinstance(loss, partial):
        inner = _function(loss.func)
        if inner is None:
            return None
        if loss.args:
            raise TypeError(f"loss={_called(loss)} has positional arguments; give partial options by their names")
        return inner[0], {**inner[1], **loss.keywords}
    if isinstance(loss, nn.Module):
        for base in type(loss).__mro__:
            if base in _MODULES and type(loss).forward is base.forward:
                function = _MODULES[base]
                names = (*_OF_CLASSES.get(function, ()), *_OF_SAMPLES.get(function, ()), "reduction")
                return function, {name: getattr(loss, name) for name in names}
        torchs = isinstance(loss, nn.modules.loss._Loss) or type(loss).__module__.startswith("torch.nn.modules")
        return (loss, {}) if torchs else None
    torchs = inspect.isroutine(loss) and str(loss.__module__).startswith("torch.nn")
    return (loss, {}) if torchs else None


def _of_classes(function: Function, options: dict[str, Any], *, soft: bool) -> TokenLoss:
    """A loss a target. Plain cross-entropy is our own, whose true Fisher is known."""
    name = _named(function, options)
    if soft and function is functional.cross_entropy:
        return _token_loss(f"{name} of probabilities", partial(_of_probabilities, options))
    plain = _ignoring(classification(class_axis=1), options.pop("ignore_index", IGNORED))
    likelihood = _named(function, options) == function.__name__  # no weight, no smoothing
    if likelihood and function is functional.cross_entropy:
        return replace(plain, name=name.replace("cross_entropy", "classification"))
    if likelihood:
        return replace(plain, name=name, negative_log_likelihood=partial(_each_class, function, {}))

    def values(output: Any, batch: Batch) -> Tensor:
        logits, ids = plain.predictions(output, batch), plain.targets(batch)
        assert ids is not None
        wrong = (ids != IGNORED) & ((ids < 0) | (ids >= logits.shape[-1]))
        if bool(wrong.any()):
            raise LossError(
                f"target {int(ids[wrong][0])} is out of range: expected 0 to {logits.shape[-1] - 1}, or "
                f"{IGNORED} for none"
            )
        return _each_class(function, options, logits, ids)

    return _token_loss(name, values, plain.valid)


def _each_class(function: Function, options: dict[str, Any], logits: Tensor, ids: Tensor) -> Tensor:
    """`(b, s)` from logits `(b, s, v)`."""
    logits = _at_least_float32(logits)
    flat = _each(function, logits.flatten(0, 1), ids.long().flatten(), options)
    return flat.reshape(ids.shape)


def _of_probabilities(options: dict[str, Any], output: Any, batch: Batch) -> Tensor:
    logits, y = _at_least_float32(logits_of(output)), _entry(batch, "cross_entropy", "labels", "targets")
    if logits.shape != y.shape or logits.ndim < 2:
        raise LossError(
            f"cross-entropy of probabilities expected targets of the logits' shape {tuple(logits.shape)}, got "
            f"{tuple(y.shape)} of {y.dtype}; class numbers are integers"
        )
    chosen = {key: option for key, option in options.items() if key != "ignore_index"}
    return _each(functional.cross_entropy, logits, y.to(logits.dtype), chosen).reshape(len(logits), -1)


def _ignoring(loss: TokenLoss, ignored: int) -> TokenLoss:
    """The loss with another number for targets that do not count."""
    if ignored == IGNORED:
        return loss

    def targets(batch: Batch) -> Tensor:
        ids = loss.targets(batch)
        assert ids is not None
        return torch.where(ids == ignored, IGNORED, ids.long())

    return replace(loss, targets=targets, valid=lambda batch: targets(batch) != IGNORED)


def _of_samples(function: Function, options: dict[str, Any], reduction: str, targets: Sequence[Tensor]) -> TokenLoss:
    """A loss a sample: torch's own of that sample alone."""
    single = all(y.numel() == y.shape[0] for y in targets if y.ndim)
    plain = all(option is None for option in options.values()) and (single or reduction == "sum")
    if function is functional.binary_cross_entropy_with_logits and plain and zero_or_one(targets):
        return binary_classification()
    name = _named(function, {**options, "reduction": reduction})

    def values(output: Any, batch: Batch) -> Tensor:
        o, y = _at_least_float32(logits_of(output)), _entry(batch, name, "labels", "targets")
        if o.shape != y.shape:
            raise LossError(
                f"outputs have shape {tuple(o.shape)}, targets {tuple(y.shape)}, and torch would pair each with each "
                "of the other; give both one shape, as by targets[:, None]"
            )
        for key, option in options.items():
            if isinstance(option, Tensor) and option.ndim == o.ndim and len(option) > 1:
                raise LossError(
                    f"{key} of shape {tuple(option.shape)} has an entry a sample; expected one that is the same for all"
                )
        y = y if function is functional.multilabel_margin_loss else y.to(o.dtype)
        each = _each(function, o, y, options).reshape(len(o), -1)
        if reduction == "none" and each.shape[1] > 1:
            raise LossError(
                f"reduction='none' leaves {each.shape[1]} losses a sample; a sample's own loss is their mean or their "
                "sum: say reduction='mean' or 'sum'. Where each is a token, loss=ff.losses.custom(...)"
            )
        return each.mean(dim=1) if reduction == "mean" else each.sum(dim=1)

    return _token_loss(name, values)


def _token_loss(
    name: str, values: Callable[[Any, Batch], Tensor], valid: Callable[[Batch], Tensor | None] = lambda batch: None
) -> TokenLoss:
    """A loss that is no likelihood we know."""

    def by_position(output: Any, batch: Batch) -> Tensor:
        losses = values(output, batch)
        return losses[:, None] if losses.ndim == 1 else losses

    return TokenLoss(
        name=name,
        shift=0,
        distribution="custom",
        predictions=by_position,
        targets=lambda batch: None,
        valid=valid,
        negative_log_likelihood=lambda losses, _: losses,
    )


def _each(function: Function, values: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    """The losses, reduced by nothing; weights are brought to where the values are, and to their dtype."""
    beside = {key: option.to(values) if isinstance(option, Tensor) else option for key, option in options.items()}
    try:
        return function(values, y, reduction="none", **beside)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise LossError(
            f"torch's {function.__name__} failed on outputs of shape {tuple(values.shape)} and targets of shape "
            f"{tuple(y.shape)} ({y.dtype}): {error}"
        ) from error


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _named(function: Function, options: dict[str, Any]) -> str:
    """The function with the options that change something: two losses of one name are one loss."""
    said = {key: option for key, option in options.items() if isinstance(option, Tensor) or option != _PLAIN.get(key)}
    words = ", ".join(f"{key}={_shown(option)}" for key, option in said.items())
    return f"{function.__name__}({words})" if words else function.__name__


def _shown(option: Any) -> str:
    if not isinstance(option, Tensor):
        return repr(option)
    return str(option.tolist()) if option.numel() <= _SHOWN else f"<{short_hash(option)}>"


def _called(loss: Any) -> str:
    return str(getattr(loss, "__name__", repr(loss)))
