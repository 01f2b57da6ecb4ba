"""Whether each loss depends on its own place of an output alone, and the cotangents there.

Axis order: n tokens, each of a sequence b and at a position p; an output has b × s places of v features.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.gradients.autodiff.pullback import gradients_of

PROBES = 2
NUM_POWERS = 16
POWERS = [sign * 2.0**k for sign in (1, -1) for k in range(NUM_POWERS)]
TINY = torch.finfo(torch.float32).tiny


def own_cotangents(
    losses: Float[Tensor, "b s"],
    output: Tensor,
    sequence: Tensor,
    position: Tensor,
    entry: Tensor | None = None,
    *,
    once: bool,
    tested: bool = True,
) -> Float[Tensor, "n v"] | None:
    """∂ℓ_n/∂output[n] for some tokens; None where a loss depends on another place, or not through `output`.

    Where a place has several losses, each round of passes takes one of every place.

    Args:
        losses: Of all sequences, in the graph.
        output: What they may depend on.
        sequence: The row of `losses` of each token.
        position: Its place in the sequence.
        entry: Its column of `losses`; the position where None.
        once: Whether no place has two of the tokens.
        tested: Whether to test that no loss depends on another place, or to assume it.
    """
    places = output[..., 0].numel() // len(losses)
    if int(position.max()) >= places or bypassed(losses, output):
        return None
    entry = position if entry is None else entry
    place = sequence * places + position
    if once:
        return _one_a_place(losses, output, place, sequence, entry, tested=tested)
    found = losses.new_zeros(len(place), output.shape[-1], dtype=output.dtype)
    for some in _rounds(place):
        rows = _one_a_place(losses, output, place[some], sequence[some], entry[some], tested=tested)
        if rows is None:
            return None
        found[some] = rows
    return found


def _rounds(place: Int[Tensor, " n"]) -> Iterator[Int[Tensor, " m"]]:
    """The tokens in as few rounds as there are of one place, each with a place at most once."""
    order = place.argsort(stable=True)
    ordered = place[order]
    turn = torch.arange(len(place), device=place.device) - torch.searchsorted(ordered, ordered)
    for number in range(int(turn.max()) + 1):
        yield order[turn == number].sort().values


def _one_a_place(
    losses: Tensor, output: Tensor, place: Tensor, sequence: Tensor, entry: Tensor, *, tested: bool
) -> Float[Tensor, "n v"] | None:
    """The cotangents of losses of different places.

    Each loss is multiplied by a random power of two, which is exact: where no place reaches another, it multiplies the
    cotangents of its own place, to the last bit. Two places that do have the same factors with probability
    (2 NUM_POWERS)^-PROBES. Cost: 1 + PROBES backward passes down to `output`, or one where nothing is tested.
    """

    def rows(weights: Tensor) -> Tensor:
        chosen = (losses[sequence, entry] * weights).sum()
        (found,) = gradients_of(chosen, [output], retain_graph=True)
        return (torch.zeros_like(output) if found is None else found).reshape(-1, output.shape[-1])

    together = rows(torch.ones_like(losses[sequence, entry]))
    if not tested:
        return together[place]
    elsewhere = torch.ones(output[..., 0].numel(), dtype=torch.bool, device=output.device)
    elsewhere = elsewhere.index_fill(0, place, value=False)
    if bool(together[elsewhere].any()):
        return None
    generator = torch.Generator().manual_seed(len(place))
    for _ in range(PROBES):
        drawn = torch.randint(len(POWERS), place.shape, generator=generator, device="cpu")
        weights = losses.new_tensor(POWERS)[drawn.to(losses.device)]
        found = rows(weights)
        if bool(found[elsewhere].any()) or not _same(found[place], together[place], weights):
            return None
    return together[place]


def _same(scaled: Float[Tensor, "n v"], plain: Float[Tensor, "n v"], weights: Float[Tensor, " n"]) -> bool:
    """Whether entries are the same but for their factors; those too small to be normal numbers lose digits."""
    finfo = torch.finfo(plain.dtype)
    wide = torch.promote_types(plain.dtype, torch.float32)
    found, expected = scaled.to(wide) / weights.to(wide)[:, None], plain.to(wide)
    return bool(((found - expected).abs() <= 4 * finfo.eps * expected.abs() + max(finfo.tiny * finfo.eps, TINY)).all())


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
