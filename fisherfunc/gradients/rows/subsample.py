"""Coordinate subsampling: at most k columns of each block of G, rescaled. A marked approximation, never a default.

For a block of P columns, k of them are drawn without replacement and scaled by √(P/k), so that the trace of the
block's Fisher stays unbiased: E Σ_{p chosen} (P/k) g_p² = Σ_p g_p².
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Which columns of each parameter's flattened gradient are kept, and their weight.

    Attributes:
        index: {name: sorted columns}; a name that is absent keeps all of its columns.
        weight: {name: √(P_b/k)} for the names of `index`.
    """

    index: Mapping[str, Tensor]
    weight: Mapping[str, float]


EVERY = Coordinates(index={}, weight={})


def sample_coordinates(
    num_params: Mapping[str, int], blocks: Mapping[str, Sequence[str]], *, max_coordinates: int, seed: int = 0
) -> Coordinates:
    """Draw at most `max_coordinates` columns a block, by a stable hash (SHA-1) of its label and the seed.

    Args:
        num_params: {name: P_p}.
        blocks: {label: names}.
        max_coordinates: k; a block of no more columns stays exact.
        seed: Another seed, other columns.

    Raises:
        ValueError: If `max_coordinates` < 1.
    """
    if not isinstance(max_coordinates, int):
        raise TypeError(f"max_coordinates expected an integer of at least 1, got {max_coordinates!r}")
    if max_coordinates < 1:
        raise ValueError(f"max_coordinates expected at least 1, got {max_coordinates}")
    index: dict[str, Tensor] = {}
    weight: dict[str, float] = {}
    for label, names in blocks.items():
        total = sum(num_params[name] for name in names)
        if total <= max_coordinates:
            continue
        chosen = torch.tensor(sorted(_draw(label, seed, total, max_coordinates)), device="cpu")
        start = 0
        for name in sorted(names):  # whatever their order
            stop = start + num_params[name]
            index[name] = chosen[(chosen >= start) & (chosen < stop)] - start
            weight[name] = (total / max_coordinates) ** 0.5
            start = stop
    return Coordinates(index=index, weight=weight)


def _draw(label: str, seed: int, total: int, count: int) -> list[int]:
    digest = hashlib.sha1(f"{seed}:{label}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big")).sample(range(total), count)
