"""Shortcuts past elementwise functions: an activation's chain of operations, as one multiplication a backward pass.

Where the input a of a linear map is an elementwise function of the outputs y of earlier ones (an activation, a gate),
∂a/∂y is diagonal. It is computed once a forward pass, by one ordinary backward pass of ones, and a batched backward
pass over many tokens then multiplies by it instead of going through every operation of the chain. Whether it is
diagonal is tested on a random cotangent, for the sequence that shows the structure.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.factored.powers import random_powers

Origins = frozenset[tuple[str, int]]
"""Uses, by parameter and number."""

POWERS = (range(4), range(7))
"""Of a row of a random cotangent, and of an entry of all rows: few numbers are drawn."""
MANY = 32
"""Rows from which on that is done; of fewer, every entry is drawn."""


def shortened_path(source: Tensor, outputs: Sequence[Tensor]) -> Tensor | None:
    """The same values as `source`, with a graph that leads to `outputs` by one product each; None where there is none.

    Args:
        source: What a linear map is about to receive.
        outputs: What it is an elementwise function of.
    """
    if any(y.numel() != source.numel() for y in outputs):
        return None
    result = source.detach()
    for y, slope in zip(outputs, _pulled_back(source, outputs, torch.ones_like(source)), strict=True):
        if slope is None:
            return None
        result = result + ((y - y.detach()) * slope).reshape(source.shape)
    return result.to(source.dtype)


def is_elementwise(source: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether the Jacobian of `source` by each output is diagonal, as far as a random cotangent shows.

    Its entries are powers of two, so that a diagonal Jacobian gives the product with the slopes to the last bit. Two
    that meet have the same with a probability of at most 1/8; those of two rows have one ratio, where there are many.
    """
    if any(y.numel() != source.numel() for y in outputs):
        return False
    generator = torch.Generator().manual_seed(0)
    rows = source.shape[0] if source.ndim and source.shape[0] >= MANY else 1
    counts = (rows, source.numel() // rows)
    powers = [random_powers((n,), p, generator).to(source) for n, p in zip(counts, POWERS, strict=True)]
    probe = torch.outer(*powers).reshape(source.shape)
    slopes, found = (_pulled_back(source, outputs, c) for c in (torch.ones_like(source), probe))
    return all(
        slope is not None and pulled is not None and _close(pulled, slope * probe.reshape(slope.shape))
        for slope, pulled in zip(slopes, found, strict=True)
    )


def is_view(tensor: Tensor, sources: Sequence[Tensor]) -> bool:
    """Whether it shares its memory with one of the sources: nothing is computed on the way to it."""
    memory = tensor.untyped_storage().data_ptr()
    return any(source.untyped_storage().data_ptr() == memory for source in sources)


def _pulled_back(source: Tensor, outputs: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
    return torch.autograd.grad(source, outputs, cotangent, retain_graph=True, allow_unused=True)


def elementwise_origins(source: Tensor, outputs: dict[Any, tuple[str, int]]) -> Origins | None:
    """The uses that an input comes from, where it comes from nothing else.

    Args:
        source: The input of a linear map.
        outputs: {graph node of the output of a use: the use}.
    """
    origins, seen, waiting = set(), set(), [source.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node in outputs:
            origins.add(outputs[node])
            continue
        if hasattr(node, "variable"):
            return None
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    return frozenset(origins) if seen and origins else None


def _close(value: Tensor, expected: Tensor) -> bool:
    tolerance = 2 * torch.finfo(value.dtype).eps
    return bool(torch.linalg.vector_norm(value - expected) <= tolerance * torch.linalg.vector_norm(expected))
