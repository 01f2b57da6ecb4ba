"""Strategies of tiny models, each with a batch that it fits. Ids and targets are `(b, s)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fisherfunc.gradients.losses import IGNORED
from fisherfunc.testing.matrices import gaussian, generator
from fisherfunc.testing.modules import TinyForCausalLM, TinyPerceptron


class TinyModel(NamedTuple):
    """A module in evaluation mode, a batch for it, and a loss `(output, batch) → (b,)`, or None: infer it."""

    module: nn.Module
    batch: Any
    loss: Callable[[Any, Any], Tensor] | None


def tiny_models(*, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[TinyModel]:
    """Models of some hundred parameters with a batch: `classifiers`, `regressors` and `language_models`.

    Args:
        dtype: That of the parameters and of inputs that are not ids.
    """
    return st.one_of(classifiers(dtype=dtype), regressors(dtype=dtype), language_models(dtype=dtype))


def classifiers(*, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[TinyModel]:
    """Multilayer perceptrons with a batch `(inputs, targets)`; some have no bias, some call a layer twice.

    Without a loss of their own, targets may be −100, but never the first.

    Args:
        dtype: That of parameters and inputs.
    """

    @st.composite
    def models(draw: st.DrawFn) -> TinyModel:
        num_classes, size = draw(st.integers(2, 3)), draw(st.integers(1, 4))
        module, inputs = _perceptron(draw, num_classes, size, dtype)
        targets = torch.randint(num_classes, (size,), generator=generator(draw))
        if draw(st.booleans()):
            return TinyModel(module, (inputs, targets), _cross_entropy)
        holes = [False, *draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))]
        return TinyModel(module, (inputs, targets.masked_fill(torch.tensor(holes), IGNORED)), None)

    return models()


def regressors(*, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[TinyModel]:
    """Multilayer perceptrons with a batch of inputs and real targets `(b, v)`.

    Args:
        dtype: That of parameters, inputs and targets.
    """

    @st.composite
    def models(draw: st.DrawFn) -> TinyModel:
        num_outputs, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        module, inputs = _perceptron(draw, num_outputs, size, dtype)
        return TinyModel(module, (inputs, gaussian(draw, size, num_outputs).to(dtype)), None)

    return models()


def language_models(*, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[TinyModel]:
    """One-layer causal transformers with a batch of keyword arguments.

    The output layer may be tied to the embedding; the output is a tensor, or a tuple with `.logits`.
    Sequences have unequal lengths from 1, padded on the right, where labels may be −100 or any id; labels may
    have holes, or be absent. The first sequence always has a valid token.

    Args:
        dtype: That of the parameters.
    """

    @st.composite
    def models(draw: st.DrawFn) -> TinyModel:
        # Of one or two entries a layer norm leaves nothing but signs: no gradient would pass it.
        vocabulary, width = draw(st.integers(2, 6)), draw(st.integers(3, 4))
        lengths = [draw(st.integers(2, 5)), *draw(st.lists(st.integers(1, 5), max_size=2))]
        tied, named = draw(st.booleans()), draw(st.booleans())
        module = _initialized(draw, lambda: TinyForCausalLM(vocabulary, width, max(lengths), tied, named), dtype)
        return TinyModel(module, token_batch(draw, lengths, vocabulary), None)

    return models()


def _cross_entropy(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(output, batch[-1], reduction="none")


def _perceptron(draw: st.DrawFn, num_outputs: int, size: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    num_inputs, width, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    bias = draw(st.booleans())
    module = _initialized(draw, lambda: TinyPerceptron(num_inputs, width, num_outputs, repeats, bias), dtype)
    return module, gaussian(draw, size, num_inputs).to(dtype)


def token_batch(draw: st.DrawFn, lengths: list[int], vocabulary: int) -> dict[str, Tensor]:
    """Ids, padded on the right, perhaps with a mask, perhaps with labels that have holes; the first has a token."""
    source = generator(draw)
    ids = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=source)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": ids}
    if not mask.all() or draw(st.booleans()):
        batch["attention_mask"] = mask.long()
    if draw(st.booleans()):
        holes = torch.rand(ids.shape, generator=source) < draw(st.sampled_from((0.0, 0.3, 0.9)))
        holes[0, 1] = False
        padding = ~mask & draw(st.booleans())
        batch["labels"] = ids.masked_fill(holes | padding, IGNORED)
    return batch


def _initialized(draw: st.DrawFn, build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator
        module = build().to(dtype).eval()
    source = generator(draw)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return module
