"""Attention heads as parameters of their own: the same function, its projections divided by head.

A projection y = W x + b of attention becomes one linear map per head, of the rows of W and b that make its part of y
(queries, keys, values), or of the columns that read its part of x (the output). With the layouts below these are

    one projection each    rows [head, d]                         LLaMA, BERT, T5, OPT; keys, values may be fewer
    fused, parts first     rows [query | key | value, head, d]    GPT-2, Phi-3, ModernBERT, MPT
    fused, heads first     rows [head, query | key | value, d]    GPT-NeoX, BLOOM

The gradient of such a parameter is the slice of the gradient of W, and all of them together are F, in another order.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherfunc.models.calls.isolation import structure_copy
from fisherfunc.partitioning.architectures import ATTENTION_OUTPUTS, FUSED_PROJECTIONS, SEPARATE_PROJECTIONS

Pieces = Mapping[str, slice]
"""{name: rows or columns}, in the order in which they stand in the weight."""
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_OTHERWISE = ("multi_query", "new_decoder_architecture", "pruned_heads")
"""What changes the layout of a family's projections: not handled, so refused where it is set."""


def divide_heads(model: nn.Module, *, num_heads: int | None = None) -> nn.Module:
    """Return the same model with a parameter for each attention head, for `blocks=ff.by_head`.

    Of each projection in an attention module, query, key, value and output, separate or fused. Where keys and values
    have fewer heads than queries (grouped queries), theirs are `kv_head_*`. The bias of an output belongs to no head.
    Tensors are shared with the model, which stays as it is. Cost: none here; a projection is then a call per head.

    Args:
        model: A module whose attention has projections with the names of a family in `partitioning/architectures.py`.
        num_heads: How many heads an attention module has, where neither it nor its configuration says.

    Raises:
        ValueError: If no attention is found, or one cannot be divided; it says which module and why.
        TypeError: If the model cannot be copied.

    Example:
        >>> attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        >>> [name for name, _ in divide_heads(nn.ModuleDict({"attn": attention}), num_heads=2).named_parameters()][:3]
        ['attn.q_proj.head_0.weight', 'attn.q_proj.head_0.bias', 'attn.q_proj.head_1.weight']
    """
    divided = structure_copy(model)
    names = [name for name, module in divided.named_modules() if _projections(module)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no attention module with projections named such as q_proj, k_proj, v_proj and "
            "o_proj, or c_attn and c_proj; by_head needs them; write a rule of your own from name to label for others"
        )
    _check_untied(divided)
    for name in names:
        _divide(divided, name, num_heads)
    return divided


class Rows(nn.Module):
    """y = W x + b, piece by piece of y."""

    def __init__(self, linear: nn.Module, pieces: Pieces) -> None:
        super().__init__()
        weight = _weight(linear)
        bias: Any = linear.bias
        for name, rows in pieces.items():
            self.add_module(name, _Piece(weight[rows], None if bias is None else bias[rows], _is_transposed(linear)))

    def forward(self, x: Tensor) -> Tensor:
        """Apply each piece to the whole input."""
        return torch.cat([piece(x) for piece in self.children()], dim=-1)


class Columns(nn.Module):
    """y = W x + b, a sum over pieces of x. The bias is `undivided_bias`: it belongs to none of them."""

    def __init__(self, linear: nn.Module, pieces: Pieces) -> None:
        super().__init__()
        self.sizes = [columns.stop - columns.start for columns in pieces.values()]
        weight = _weight(linear)
        for name, columns in pieces.items():
            self.add_module(name, _Piece(weight[:, columns], None, _is_transposed(linear)))
        self.undivided_bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply each piece to its part of the input, and add up."""
        parts = zip(self.children(), x.split(self.sizes, dim=-1), strict=True)
        total = sum(piece(part) for piece, part in parts)
        return total if self.undivided_bias is None else total + self.undivided_bias


class _Piece(nn.Module):
    """A linear map whose weight lies as that of the map that it is a piece of: (d_in, d_out) where transposed."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = _parameter(weight.mT if transposed else weight)
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.transposed:
            return nn.functional.linear(x, self.weight, self.bias)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def _parameter(piece: Tensor) -> nn.Parameter:
    return nn.Parameter(piece.detach(), requires_grad=piece.requires_grad)


def _is_transposed(linear: nn.Module) -> bool:
    """Whether it is Transformers' Conv1D, the linear map whose weight is (d_in, d_out)."""
    return type(linear).__name__ == "Conv1D"


def _weight(linear: nn.Module) -> Tensor:
    """The weight as (d_out, d_in)."""
    weight: Any = linear.weight
    return weight.mT if _is_transposed(linear) else weight


def _projections(module: nn.Module) -> tuple[str, ...]:
    """The names of the projections to queries, keys and values in an attention module; none where it is no such."""
    for names in (*SEPARATE_PROJECTIONS, *((name,) for name in FUSED_PROJECTIONS)):
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return names
    return ()


def _output(model: nn.Module, name: str) -> str | None:
    """The path of the output projection of an attention module: beside the others, or in `output` beside the module."""
    module = model.get_submodule(name)
    for own in ATTENTION_OUTPUTS:
        if isinstance(getattr(module, own, None), nn.Module):
            return f"{name}.{own}" if name else own
    beside = name.rpartition(".")[0]
    path = f"{beside}.output.dense" if beside else "output.dense"
    return path if name.rpartition(".")[2] == "self" and _has(model, path) else None


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _divide(model: nn.Module, name: str, num_heads: int | None) -> None:
    attention, names, output = model.get_submodule(name), _projections(model.get_submodule(name)), _output(model, name)
    for option in _OTHERWISE:
        if _said(attention, model, (option,)):
            raise ValueError(f"attention module {name!r} has {option}: where its heads lie is not known here")
    if output is None:
        raise ValueError(f"attention module {name!r} has no output projection named any of {ATTENTION_OUTPUTS}")
    linears = {path: model.get_submodule(path) for path in (*(f"{name}.{own}".lstrip(".") for own in names), output)}
    for path, linear in linears.items():
        if type(linear) is not nn.Linear and not _is_transposed(linear):
            raise ValueError(
                f"projection {path!r} is a {type(linear).__name__}, expected a torch.nn.Linear; merge adapters into "
                "their base, dequantise, or undo parametrizations, before heads are divided"
            )
    heads = num_heads or _said(attention, model, _COUNTS)
    if not heads:
        raise ValueError(f"attention module {name!r} does not say how many heads it has; give divide_heads num_heads=")
    *inner, outer = linears.items()
    width = _weight(outer[1]).shape[1]
    size = _size(width, heads, outer[0])
    if len(names) == 1:
        rows = [*_fused(names[0], _weight(inner[0][1]).shape[0], heads, size, inner[0][0])]
        replaced = {inner[0][0]: Rows(inner[0][1], dict(rows))}
    else:
        replaced = {}
        for path, linear in inner:
            count, rest = divmod(_weight(linear).shape[0], size)
            if rest or (path == inner[0][0] and count != heads) or heads % count:
                raise ValueError(
                    f"projection {path!r} has {_weight(linear).shape[0]} outputs, expected heads of {size}, that go "
                    f"into {heads}; check num_heads"
                )
            replaced[path] = Rows(linear, dict(_stretch("", count, heads, size, 0)))
    model_parts = {**replaced, outer[0]: Columns(outer[1], dict(_stretch("", heads, heads, size, 0)))}
    for path, part in model_parts.items():
        model.set_submodule(path, part.train(model.training))


def _size(width: int, heads: int, path: str) -> int:
    if width % heads:
        raise ValueError(f"projection {path!r} has {width} inputs, which {heads} heads do not divide; check num_heads")
    return width // heads


def _fused(own: str, width: int, heads: int, size: int, path: str) -> Iterator[tuple[str, slice]]:
    """The pieces of a fused projection, in order."""
    kv, rest = divmod(width - heads * size, 2 * size)
    if rest or kv < 1 or heads % kv or (kv != heads and FUSED_PROJECTIONS[own] == "heads first"):
        raise ValueError(f"projection {path!r} has {width} outputs, expected those of {heads} heads of {size}, fused")
    if FUSED_PROJECTIONS[own] == "heads first":
        for head in range(heads):
            for place, part in enumerate(("query", "key", "value")):
                begin = (3 * head + place) * size
                yield f"{part}_head_{head}", slice(begin, begin + size)
        return
    yield from _stretch("query_", heads, heads, size, 0)
    yield from _stretch("key_", kv, heads, size, heads * size)
    yield from _stretch("value_", kv, heads, size, (heads + kv) * size)


def _stretch(part: str, count: int, heads: int, size: int, begin: int) -> Iterator[tuple[str, slice]]:
    """Heads one after another: (name, rows)."""
    kind = "head" if count == heads else "kv_head"
    for head in range(count):
        yield f"{part}{kind}_{head}", slice(begin + head * size, begin + (head + 1) * size)


def _said(attention: nn.Module, model: nn.Module, names: tuple[str, ...]) -> Any:
    """What an attention module, its configuration or the model's says under one of some names; None where none does."""
    for holder in (attention, getattr(attention, "config", None), getattr(model, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if value is not None and not isinstance(value, nn.Module):
                return value
    return None


def _check_untied(model: nn.Module) -> None:
    """A projection tied to another parameter would be two parameters after it is divided; a shared module is one."""
    seen: dict[int, tuple[str, nn.Module, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        *path, own = name.rsplit(".", 2)[-3:]
        holder = model.get_submodule(path[0]) if len(path) == 2 else model
        here = (name, holder, f"{path[-1]}.{own}" if path else own)
        other = seen.setdefault(id(parameter), here)
        divided = any(place.split(".")[0] in _projections(module) for _, module, place in (here, other))
        if divided and (other[1] is not holder or other[2] != here[2]):
            raise ValueError(f"projection {name!r} is tied to {other[0]!r}; divided, one parameter would become two")
