"""What a torch function does with a parameter, and so what the parameter's gradient is made of.

| role | the function | a row's gradient, δ its cotangent of the output |
| --- | --- | --- |
| Map | y_s = W a_s, or W[ids] | Σ_s δ_s ⊗ a_s |
| Convolution | the same on the patches a_s of an image | Σ_s δ_s ⊗ a_s, group by group |
| Scale | y = w x, broadcast | Σ δ x over the axes that w is broadcast along |
| Shift | y = x + w, broadcast | Σ δ over the same |

`RULES` maps a torch function to the roles of its arguments; where a call fits no rule, nothing is assumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Map:
    """A linear map: its input (vectors, or ids of rows), and the axis of the weight that its output lies along."""

    source: Tensor
    axis: int

    @property
    def multiplies(self) -> bool:
        """Whether its input is vectors."""
        return self.source.is_floating_point()


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution `(b, c, *spatial)` in one or two dimensions; each option has an entry a spatial axis."""

    source: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An elementwise product with a parameter of `shape`; `factor` gives what it is multiplied by."""

    factor: Callable[[], Tensor]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A sum with a parameter of `shape`."""

    shape: tuple[int, ...]


Role = Map | Convolution | Scale | Shift
Found = list[tuple[Any, Role]] | None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    """Y = x Wᵀ + b."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return [(weight, Map(source=input, axis=0)), *_shift(bias, weight.shape[:1])]


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Found:
    """Y = b + x W, as in Conv1D."""
    if beta != 1 or alpha != 1 or input.shape != mat2.shape[1:]:
        return None
    return [(mat2, Map(source=mat1, axis=1)), *_shift(input, mat2.shape[1:])]


def _matmul(input: Tensor, other: Tensor) -> Found:
    """Y = x W."""
    return [(other, Map(source=input, axis=1))] if other.ndim == 2 and input.ndim >= 2 else None


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Found:
    """Y = W[ids]; the row of `padding_idx` has no gradient, so its places get an id that equals none."""
    if max_norm is not None or scale_grad_by_freq or weight.ndim != 2:
        return None
    ids = input if padding_idx is None else torch.where(input == padding_idx % len(weight), -1, input)
    return [(weight, Map(source=ids, axis=1))]


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Found:
    """Cross-correlation of an image with a batch axis; other padding modes pad the image before."""
    axes = weight.ndim - 2
    if input.ndim != weight.ndim:
        return None
    kernel, dilated = tuple(weight.shape[2:]), _each(dilation, axes)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilated, kernel, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _each(0 if isinstance(padding, str) else padding, axes))
    role = Convolution(
        source=input, kernel=kernel, stride=_each(stride, axes), padding=pads, dilation=dilated, groups=groups
    )
    return [(weight, role), *_shift(bias, (len(weight), *[1] * axes))]


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found:
    def plain() -> Tensor:
        return functional.layer_norm(input, normalized_shape, eps=eps)

    return [*_scale(weight, plain), *_shift(bias)]


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Found:
    return _scale(weight, lambda: functional.rms_norm(input, list(normalized_shape), eps=eps))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Found:
    shape = _of_channels(input)
    return [*_scale(weight, lambda: functional.group_norm(input, num_groups, eps=eps), shape), *_shift(bias, shape)]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Found:
    """By running statistics; those of a batch would make a row depend on its neighbours."""
    if training or running_mean is None:
        return None
    shape = _of_channels(input)

    def plain() -> Tensor:
        return functional.batch_norm(input, running_mean, running_var, eps=eps)

    return [*_scale(weight, plain, shape), *_shift(bias, shape)]


def _prelu(input: Tensor, weight: Tensor) -> Found:
    shape = _of_channels(input) if weight.numel() > 1 else (1,)
    return _scale(weight, lambda: input.clamp(max=0), shape) if input.ndim > 1 else None


def _mul(input: Any, other: Any) -> Found:
    return [
        (mine, Scale(factor=partial(_constant, theirs, like=mine), shape=tuple(mine.shape)))
        for mine, theirs in ((input, other), (other, input))
        if isinstance(mine, Tensor)
    ]


def _constant(factor: Any, *, like: Tensor) -> Tensor:
    """A factor as a tensor; a number of Python's has the precision of what it is multiplied by."""
    return factor if isinstance(factor, Tensor) else torch.as_tensor(factor, dtype=like.dtype, device=like.device)


def _add(input: Any, other: Any) -> Found:
    return [role for term in (input, other) if isinstance(term, Tensor) for role in _shift(term)]


def _expand(input: Tensor, *sizes: Any) -> Found:
    return _shift(input)


def _shift(term: Tensor | None, shape: Sequence[int] | None = None) -> list[tuple[Any, Role]]:
    return [] if term is None else [(term, Shift(shape=tuple(term.shape if shape is None else shape)))]


def _scale(
    weight: Tensor | None, factor: Callable[[], Tensor], shape: Sequence[int] | None = None
) -> list[tuple[Any, Role]]:
    if weight is None:
        return []
    return [(weight, Scale(factor=factor, shape=tuple(weight.shape if shape is None else shape)))]


def _of_channels(input: Tensor) -> tuple[int, ...]:
    """A parameter with an entry a channel, as it is broadcast to `(b, c, *spatial)`."""
    return (input.shape[1], *[1] * (input.ndim - 2))


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes if len(value) == 1 else 1)


RULES: dict[Any, Callable[..., Found]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    functional.embedding: _embedding,
    functional.conv1d: _convolve,
    functional.conv2d: _convolve,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    functional.batch_norm: _batch_norm,
    torch.prelu: _prelu,
    torch.mul: _mul,
    Tensor.mul: _mul,
    torch.add: _add,
    Tensor.add: _add,
    Tensor.expand: _expand,
}

TRANSPOSES = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]


def explained(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Role]]:
    """The arguments of a call that a rule gives a role; none where no rule fits."""
    rule = RULES.get(func)
    if rule is None:
        return []
    try:
        return rule(*args, **kwargs) or []
    except (TypeError, IndexError):  # called by other names than the rule's, as in torch.mm(x, mat2=w), or scalars
        return []
