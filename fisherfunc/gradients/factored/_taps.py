"""Where parameters enter a model's computation: the only module that intercepts what a model does.

While a model runs, every torch function that receives a parameter is seen. Where it is one of the known linear maps
(`RULES`), its output is kept in the autograd graph and its input beside it: the cotangent of the output and the input
are the factors of the parameter's gradient. A parameter that is used in any other way is reported, not guessed at.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """What factors are kept in: products of float16 numbers overflow at 65,504."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a parameter by a linear map.

    Attributes:
        name: The parameter.
        output: What the map returned, in the graph; its leading axes are places.
        version: Of `output`, to see whether it was written to later.
        source: Its input, in the graph, or ids; empty for an added bias.
        is_bias: Whether it was added, rather than multiplied by.
        axis: The axis of the parameter that cotangents of the output lie along.
    """

    name: str
    output: Tensor
    version: int
    source: Tensor
    is_bias: bool
    axis: int

    @property
    def shared(self) -> Tensor:
        """The input, flattened to `(s, e)`, or ids `(s,)`."""
        source = self.source.detach()
        if not source.is_floating_point():
            return source.reshape(-1)
        return source.reshape(-1, source.shape[-1]).to(factor_dtype(self.output.dtype))  # another under autocast


@dataclass
class Recording:
    """What was seen of one forward pass.

    Attributes:
        uses: Of the parameters that were watched, in order.
        unknown: Parameters used in a way that no rule knows, and the function that did.
    """

    uses: list[Use] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)

    def overwritten(self) -> set[str]:
        """Parameters whose output was changed in place after it was kept."""
        return {use.name for use in self.uses if use.output._version != use.version}


class Recorder(TorchFunctionMode):
    """Record the uses of some parameters while the context is active.

    Args:
        parameters: {name: tensor}, recognised by identity; the model must be given these very tensors.
        protected: Parameters whose outputs the model writes to: it gets copies of them to write to.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, protected: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.recording = Recording()
        self._protected = protected
        self._kept: list[Tensor] = list(parameters.values())  # alive, so that an id stays theirs
        self._names = {id(tensor): (name, False) for name, tensor in parameters.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; if it receives a watched parameter, record it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled():  # no gradient comes this way
            return result
        names = self._watched(args, kwargs)
        if names and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            if func in TRANSPOSES and result.ndim == 2:
                self._alias(args[0], result)
            else:
                return self._record(func, args, kwargs, result, names)
        return result

    def _watched(self, args: Any, kwargs: Any) -> Counter[str]:
        """How often each parameter is among the arguments."""
        return Counter(
            self._names[id(leaf)][0]
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and id(leaf) in self._names
        )

    def _alias(self, original: Tensor, transposed: Tensor) -> None:
        name, flipped = self._names[id(original)]
        self._kept.append(transposed)
        self._names[id(transposed)] = (name, not flipped)

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, names: Counter[str]) -> Any:
        """Record what `func` did with the named parameters; returns what the model is to go on with."""
        explained: Counter[str] = Counter()
        for tensor, source, axis in _explained(func, args, kwargs, result):
            name, flipped = self._names.get(id(tensor), (None, False))
            if name is None:
                continue
            if not result.requires_grad:
                result.requires_grad_()
            axis = 1 - axis if flipped else axis
            self.recording.uses.append(
                Use(
                    name=name,
                    output=result,
                    version=result._version,
                    source=result.new_empty(0) if source is None else source,
                    is_bias=source is None,
                    axis=axis,
                )
            )
            explained[name] += 1
        for name in names - explained:  # also where one of two roles in one call is explained, as in W @ W
            self.recording.unknown[name] = getattr(func, "__name__", str(func))
        written_to = bool(self._protected & set(names)) or (explained and result.is_leaf)  # no leaf can be written to
        return result.clone() if written_to else result


Found = list[tuple[Tensor | None, Tensor | None, int]] | None


def _explained(func: Any, args: Any, kwargs: Any, result: Any) -> list[tuple[Tensor | None, Tensor | None, int]]:
    """What a rule says of a call: {a parameter, its input, the axis of the output}; nothing where no rule fits."""
    rule = RULES.get(func)
    if rule is None or torch._C._functorch.is_functorch_wrapped_tensor(result):
        return []
    try:
        return rule(*args, **kwargs) or []
    except TypeError:  # called by other names than the rule's, as in torch.mm(x, mat2=w)
        return []


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found:
    """Y = x Wᵀ + b."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return [(weight, input, 0), (bias, None, 0)]


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Found:
    """Y = b + x W, as in Conv1D."""
    if beta != 1 or alpha != 1 or input.shape != mat2.shape[1:]:
        return None
    return [(mat2, mat1, 1), (input, None, 0)]


def _matmul(input: Tensor, other: Tensor) -> Found:
    """Y = x W."""
    return [(other, input, 1)] if other.ndim == 2 and input.ndim >= 2 else None


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
    ids = input.reshape(-1)
    return [(weight, ids if padding_idx is None else torch.where(ids == padding_idx % len(weight), -1, ids), 1)]


RULES: dict[Any, Callable[..., Found]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    functional.embedding: _embedding,
}

TRANSPOSES = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
