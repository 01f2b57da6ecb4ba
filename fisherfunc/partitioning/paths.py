"""A parameter's dotted name, taken apart: the modules it lives in, its own name, its repeated stack.

``transformer.h.3.attn.c_proj.weight`` is the tensor ``weight`` of ``attn.c_proj`` in member 3 of the
stack ``transformer.h``. What wraps a module without being one (PEFT adapters, ``torch.compile``,
parametrizations) is taken off, so that an adapter's tensor has the path of the module it adapts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fisherfunc.partitioning import architectures as words

_NUMBERED = re.compile(r"\w*_(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """The modules from the root to the owner, the tensor's own name, and the stack's position.

    ``stack`` is the index in ``modules`` of the outermost number, or None without one:
    ``modules[stack - 1]`` is the container and ``modules[stack + 1:]`` lies inside one member.
    """

    modules: tuple[str, ...]
    tensor: str
    stack: int | None

    @property
    def around(self) -> tuple[str, ...]:
        """The modules up to the stack's container, or all of them where there is no stack."""
        return self.modules[: self.stack]

    @property
    def inside(self) -> tuple[str, ...]:
        """The modules below one member of the stack."""
        return () if self.stack is None else self.modules[self.stack + 1 :]


def parse(name: str) -> Path:
    """Take a dotted parameter name apart.

    Args:
        name: As `named_parameters` gives it, with or without adapters and wrappers.

    Returns:
        The path without wrappers; any string has one.

    Example:
        >>> parse("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight")
        Path(modules=('model', 'layers', '3', 'mlp', 'up_proj'), tensor='weight', stack=2)
        >>> parse("fc1.parametrizations.weight.original0")
        Path(modules=('fc1',), tensor='weight', stack=None)
    """
    *parents, tensor = name.split(".")
    modules = tuple(part for part in parents if part not in words.WRAPPERS)
    for prefix in words.WRAPPING_PREFIXES:
        if modules[: len(prefix)] == prefix:
            modules = modules[len(prefix) :]
    if "parametrizations" in modules[:-1]:
        at = modules.index("parametrizations")
        modules, tensor = modules[:at], modules[at + 1]
    adapters = (at for at, part in enumerate(modules) if words.ADAPTERS.match(part.lower()))
    modules = modules[: next(adapters, None)]
    return Path(modules=modules, tensor=tensor, stack=_outermost_number(modules))


def number(part: str) -> str:
    """Return the number that a stack's member carries: ``3`` of ``3`` and of ``encoder_layer_3``."""
    numbered = _NUMBERED.fullmatch(part)
    return numbered[1] if numbered else part


def scope(modules: Sequence[str], *, without: frozenset[str]) -> tuple[str, ...]:
    """Return the modules worth a place in a label, each once where it repeats itself.

    Args:
        modules: From the root inwards.
        without: Words that say nothing here.

    Returns:
        What is left, in order.

    Example:
        >>> scope(("encoder", "bert", "encoder"), without=frozenset({"bert"}))
        ('encoder',)
    """
    return tuple(part for part, _ in groupby(part for part in modules if part not in without))


def _outermost_number(modules: tuple[str, ...]) -> int | None:
    containers = ("", *modules)
    numbers = (
        at
        for at, part in enumerate(modules)
        if part.isdecimal() or (containers[at] in words.STACKS and _NUMBERED.fullmatch(part))
    )
    return next(numbers, None)
