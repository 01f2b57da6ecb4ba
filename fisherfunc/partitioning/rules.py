"""Rules: pure functions from a parameter's name to the label of its block.

Each reads one name at a time and knows no model, so any function ``str -> str`` can stand in for
them. A tensor tied to several names is placed by the one name it is listed under.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from fisherfunc.partitioning import architectures as words
from fisherfunc.partitioning.paths import Path, number, parse, scope

Rule = Callable[[str], str]

OTHER: Final = "other"
"""The label of what a rule does not place: visible in every result, never dropped."""

_RECURRENT = re.compile(r"(?:weight|bias)_(?:ih|hh|hr)_(l\d+)(?:_reverse)?")
UNDIVIDED: Final = "undivided_bias"
"""What `divide_heads` calls the bias of an output projection, which is no head's."""
_HEAD = re.compile(r"(?:query_|key_|value_)?((?:kv_)?head)_(\d+)")
_PROJECTIONS = {name for names in words.SEPARATE_PROJECTIONS for name in names}
_PROJECTIONS |= {*words.FUSED_PROJECTIONS, *words.ATTENTION_OUTPUTS}
_KNOWN_PREFIXES = words.BACKBONES | words.TOWERS | words.STREAMS


def by_layer(name: str) -> str:
    """Label a parameter by its layer: ``layer.3``, ``encoder.layer.3``, ``embedding``, ``output``.

    The outermost numbered container is the layer; encoders, decoders and towers keep their name.
    Around the stack: ``embedding``, ``output`` (heads and poolers) and ``final_norm``. In a network
    without such words the owning module's path is the layer, and each depth of an LSTM is one
    (both directions together). A parameter of the root module itself has no layer: ``other``.

    Args:
        name: The parameter's dotted name.

    Returns:
        The label of its block.

    Example:
        >>> by_layer("transformer.h.3.attn.c_attn.weight")
        'layer.3'
        >>> by_layer("decoder.block.3.layer.1.EncDecAttention.q.weight")
        'decoder.layer.3'
        >>> by_layer("model.vision_tower.encoder.layers.0.mlp.fc1.bias")
        'vision_tower.encoder.layer.0'
        >>> [by_layer(name) for name in ("lm_head.weight", "fc1.weight", "lstm.weight_ih_l1")]
        ['output', 'fc1', 'lstm.l1']
    """
    path = parse(name)
    end = None if _in_known_stack(path) else _end_label(path)
    if end is None and path.stack is not None:
        return _stack_label(path.around, number(path.modules[path.stack]))
    return end or _final_norm_label(path) or _owner_label(path)


def by_module(name: str) -> str:
    """Label a parameter by its role: attention, mlp, mixer, normalization, embedding or output.

    A parameter owned by a norm is ``normalization`` wherever it stands; every other takes the role
    of the outermost word the tables know inside its layer, else around it. Routers and experts are
    ``mlp``; state-space blocks (Mamba) are ``mixer``; heads and poolers are ``output``. What
    carries no known word, such as a plain convolution or a numbered linear layer, is ``other``.

    Args:
        name: The parameter's dotted name.

    Returns:
        The label of its block.

    Example:
        >>> by_module("transformer.h.0.attn.c_proj.weight")
        'attention'
        >>> by_module("transformer.h.0.mlp.c_proj.weight")
        'mlp'
        >>> by_module("bert.encoder.layer.0.attention.output.LayerNorm.bias")
        'normalization'
        >>> [by_module(name) for name in ("shared.weight", "lm_head.weight", "conv1.weight")]
        ['embedding', 'output', 'other']
    """
    path = parse(name)
    if path.modules and words.NORMALIZATION.match(path.modules[-1].lower()):
        return "normalization"
    if path.stack is not None:
        role, _ = _first_role((*path.inside, path.tensor), words.INSIDE)
        if role:
            return role
    around = path.around if path.stack is not None else (*path.around, path.tensor)
    role, _ = _first_role(around, words.OUTSIDE)
    return role or ("output" if _is_linear_decoder(path) else OTHER)


def by_head(name: str) -> str:
    """Label a parameter of a model divided by `ff.divide_heads` by its attention head: ``layer.3.head.5``.

    The block of a head has its rows of the projections to queries, keys and values, and its columns of the output.
    Where keys and values have fewer heads, theirs are ``kv_head``; heads of attention to another stream are
    ``cross_head``. What else a layer has is its ``rest``; around the stack labels are those of `by_layer`.

    Args:
        name: The parameter's dotted name.

    Returns:
        The label of its block.

    Raises:
        ValueError: If it is a projection of attention that is not divided.

    Example:
        >>> by_head("transformer.h.3.attn.c_attn.query_head_5.weight")
        'layer.3.head.5'
        >>> [by_head(f"model.layers.0.{part}.weight") for part in ("self_attn.k_proj.kv_head_1", "mlp.up_proj")]
        ['layer.0.kv_head.1', 'layer.0.rest']
    """
    path = parse(name)
    heads = [(at, found) for at, part in enumerate(path.modules) if (found := _HEAD.fullmatch(part))]
    if heads:
        at, found = heads[0]
        attention = path.modules[: at - 1]
        cross = any(words.CROSS_ATTENTION.match(part.lower()) for part in attention)
        around = (
            by_layer(".".join((*path.modules[:at], path.tensor))) if path.stack is not None else ".".join(attention)
        )
        return ".".join(filter(None, (around, ("cross_" if cross else "") + found[1], found[2])))
    whole_projection = path.tensor != UNDIVIDED and path.modules[-1:] and path.modules[-1] in _PROJECTIONS
    if whole_projection and by_module(name) == "attention":
        raise ValueError(
            f"by_head met {name!r}, a projection of attention with all heads in one parameter; divide the model first: "
            "fisher_spectrum(ff.divide_heads(model), …, blocks=ff.by_head)"
        )
    return f"{by_layer(name)}.rest" if _in_known_stack(path) else by_layer(name)


def by_parameter(name: str) -> str:
    """Give every parameter tensor its own block.

    Args:
        name: The parameter's dotted name.

    Returns:
        The name itself.

    Example:
        >>> by_parameter("fc1.weight")
        'fc1.weight'
    """
    return name


def whole(name: str) -> str:
    """Put all parameters into one block.

    Args:
        name: The parameter's dotted name.

    Returns:
        ``all``.

    Example:
        >>> whole("fc1.weight")
        'all'
    """
    return "all"


RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {"layer": by_layer, "module": by_module, "head": by_head, "parameter": by_parameter, "whole": whole}
)
"""The rules by the names they have on the command line."""


def _first_role(parts: Iterable[str], vocabulary: words.Vocabulary) -> tuple[str | None, int]:
    """Return the role of the outermost part that the vocabulary knows, and how far in it stands."""
    for depth, part in enumerate(parts):
        for role, pattern in vocabulary.items():
            if pattern.match(part.lower()):
                return role, depth
    return None, -1


def _in_known_stack(path: Path) -> bool:
    return bool(path.stack) and path.around[-1] in words.STACKS


def _stack_label(around: tuple[str, ...], index: str) -> str:
    if not around:
        return f"layer.{index}"
    *prefix, container = around
    if container in words.STACKS:
        return ".".join((*scope(prefix, without=words.BACKBONES), words.STACKS[container], index))
    if container in words.STREAMS:
        return ".".join((*scope(around, without=words.BACKBONES), "layer", index))
    return ".".join((*around, index))


def _end_label(path: Path) -> str | None:
    """Label the two ends. They are shared by encoder and decoder, hence without their names."""
    if not path.modules:
        return None
    parts = (*path.around, path.tensor) if path.stack is None else path.around
    role, depth = _first_role(parts, words.ENDS)
    if role is None:
        return "output" if _is_linear_decoder(path) else None
    return ".".join((*scope(parts[:depth], without=words.BACKBONES | words.STREAMS), role))


def _final_norm_label(path: Path) -> str | None:
    *prefix, owner = path.modules or ("",)
    if not words.FINAL_NORM.match(owner.lower()) or not _KNOWN_PREFIXES.issuperset(prefix):
        return None
    return ".".join((*scope(prefix, without=words.BACKBONES), "final_norm"))


def _owner_label(path: Path) -> str:
    recurrent = _RECURRENT.fullmatch(path.tensor)
    return ".".join((*path.modules, *(recurrent.groups() if recurrent else ()))) or OTHER


def _is_linear_decoder(path: Path) -> bool:
    """Tell a masked-language head's ``decoder.bias`` (ModernBERT) from the decoder of a model."""
    return path.modules[-1:] == ("decoder",) and path.tensor in ("weight", "bias")
