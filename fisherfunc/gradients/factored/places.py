"""Whether each loss depends on its own place of an output alone, and the cotangents there.

Axis order: n tokens, each of a sequence b and at a position p; an output has b × s places of v features.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def own_cotangents(
    losses: Float[Tensor, "b s"], output: Tensor, sequence: Tensor, position: Tensor, *, num_halves: int | None = None
) -> Float[Tensor, "n v"] | None:
    """∂ℓ_n/∂output[n] for some tokens; None where a loss depends on another place, or not through `output`.

    Exact: where the cotangents of some losses are zero, so are those of their places. Two places differ in a bit of
    their number, so that halves by each bit tell them all apart. Cost: 1 + log₂ N backward passes down to `output`.

    Args:
        losses: Of all sequences and positions, in the graph.
        output: What they may depend on.
        sequence: The row of `losses` of each token.
        position: Its column.
        num_halves: Hold this many random halves against each other, rather than those by all bits: each finds two
            places that reach each other with probability one half.
    """
    places = output[..., 0].numel() // len(losses)
    if int(position.max()) >= places or bypassed(losses, output):
        return None
    place = sequence * places + position

    def rows(some: Tensor) -> Tensor:
        chosen = losses[sequence[some], position[some]].sum()
        (found,) = torch.autograd.grad(chosen, output, retain_graph=True, allow_unused=True)
        return torch.zeros_like(output).flatten(0, -2) if found is None else found.flatten(0, -2)

    everything = torch.ones_like(place, dtype=torch.bool)
    together = rows(everything)
    elsewhere = torch.ones(len(together), dtype=torch.bool, device=output.device).index_fill(0, place, value=False)
    if bool(together[elsewhere].any()):
        return None
    for half in _halves(len(place), num_halves):
        half = half.to(place.device)
        for some in (half, ~half):
            found = rows(some)
            if bool(found[place[~some]].any()):
                return None
            if torch.equal(found[place[some]], together[place[some]]):
                break  # then the other half has nothing here: cotangents add
    return together[place]


def _halves(count: int, num_halves: int | None) -> list[Tensor]:
    number = torch.arange(count)
    bits = (count - 1).bit_length()
    if num_halves is None or num_halves >= bits:
        return [(number >> bit) % 2 == 0 for bit in range(bits)]
    generator = torch.Generator().manual_seed(count)
    return [torch.randperm(count, generator=generator) < count // 2 for _ in range(num_halves)]


def bypassed(losses: Tensor, output: Tensor) -> bool:
    """Whether the graph leads from the losses to a leaf past `output`."""
    seen = {torch.autograd.graph.get_gradient_edge(output).node, None}
    waiting: list[Any] = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if hasattr(node, "variable"):
            return True
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    return False
