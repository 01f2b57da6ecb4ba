"""What each parameter costs the factored route, in operations and bytes: the cost rule and the groups.

For N tokens, n of them a sequence of S places: contracting a weight with d features along its own axis pairwise costs
N² S d (1 + S/n) operations, half of it for a causal model; formed gradients of p entries cost 2 N² p in the Gram's
dtype and 2 N S p to form. A rule per tensor decides, never a layer's type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fisherfunc.gradients.factored.structure import Structure, Traced, apart
from fisherfunc.linalg.strips import FEATURES

CALL = 4e6
"""Operations that the overhead of one small product is worth."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How much there is.

    Attributes:
        num_tokens: N.
        num_sequences: That have a token.
        itemsize: Of a gradient entry.
    """

    num_tokens: int
    num_sequences: int
    itemsize: int


def formed_cheaper(traced: Traced, structure: Structure, num_params: Mapping[str, int], tally: Tally) -> list[str]:
    """The factored parameters whose gradients had better be formed."""
    _, uses = apart(traced.recording, structure)
    pairwise: dict[str, float] = {}
    for use in uses:
        if use.is_bias or use.name == structure.head or len(use.shared) == 1:
            continue
        places, features = len(use.shared), use.output.shape[-1]
        pairwise[use.name] = pairwise.get(use.name, 0.0) + _pairwise(places, features, tally, causal=structure.causal)
    return [name for name, cost in pairwise.items() if _formed(num_params[name], tally) < cost]


def _pairwise(places: int, features: int, tally: Tally, *, causal: bool) -> float:
    per_sequence = tally.num_tokens / tally.num_sequences
    products = tally.num_tokens**2 * places * features * (1 + places / per_sequence) * (0.5 if causal else 1.0)
    return products + tally.num_sequences**2 / 2 * -(-features // FEATURES) * CALL


def _formed(size: int, tally: Tally) -> float:
    return 4.0 * tally.num_tokens**2 * size


def held_bytes(traced: Traced, structure: Structure, num_params: Mapping[str, int], tally: Tally) -> dict[str, int]:
    """What is held of each parameter until its Gram is made: factors or rows of all tokens."""
    entries = {name: num_params[name] for name in structure.dense}
    at_head, _ = apart(traced.recording, structure)
    for use in traced.recording.uses:
        features = use.output.shape[-1]
        if use.is_bias:
            entries[use.name] = features
        elif any(use is other for other in at_head):
            entries[use.name] = entries.get(use.name, 0) + features + use.shared.shape[-1]
        else:
            padded = -(-features // FEATURES) * FEATURES if features > FEATURES else features
            entries[use.name] = entries.get(use.name, 0) + len(use.shared) * padded
    return {name: count * tally.num_tokens * tally.itemsize for name, count in entries.items()}


def grouped(held: Mapping[str, int], budget: int) -> tuple[tuple[frozenset[str], ...], list[str]]:
    """Groups of parameters that fit the budget together, from the last to the first, and parameters that never fit."""
    groups: list[set[str]] = [set()]
    room = budget
    too_large = [name for name, size in held.items() if size > budget]
    for name in reversed([name for name in held if name not in too_large]):
        if held[name] > room:
            groups.append(set())
            room = budget
        groups[-1].add(name)
        room -= held[name]
    return tuple(frozenset(group) for group in groups if group), too_large


def backward_bytes(traced: Traced, structure: Structure, chunk_size: int, saved: tuple[int, int]) -> int:
    """What one batched backward pass holds: the graph, cotangents on their way, and those that are kept.

    Args:
        traced: A pass over the longest sequence.
        structure: What is exploited: with an output layer the batched pass starts below it.
        chunk_size: Tokens a batched backward pass.
        saved: What the graph keeps: all of it, and its largest tensor.
    """
    _, below = apart(traced.recording, structure)
    sizes = {id(use.output): use.output.numel() * use.output.element_size() for use in below}
    widest = saved[1] if structure.head is None else max(sizes.values(), default=0)
    return saved[0] + chunk_size * (sum(sizes.values()) + 4 * widest)


def largest_group(groups: Sequence[frozenset[str]], held: Mapping[str, int]) -> int:
    """The bytes of the largest group."""
    return max((sum(held[name] for name in group) for group in groups), default=0)
