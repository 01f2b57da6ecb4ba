"""Grams of factored gradients, block by block of features, so that what is multiplied stays in the cache.

For rows n of one sequence and m of another, K[n,m] = Σ_k ⟨own_n, (A Aᵀ) own_m⟩ over blocks k of features: the middle
product of a block is some megabytes, and no gradient and no N × S × d intermediate is formed. Rows that cover only the
first places of their sequence (a causal model) take part with those alone.

Axis order of a strip's `own`: `(k, n, s, f)`, k blocks of f features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from fisherfunc.linalg.factors import SharedFactors, inner_products

FEATURES = 128


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The own factors of the rows of one sequence, for a range of the weight's features.

    Attributes:
        rows: The rows of the Gram.
        shared: `(s, e)`, what the rows share, or the ids `(s,)` of one-hot vectors.
        axis: The axis of the weight that the features lie along.
        width: How many features.
        own: `(k, n, s, f)`, zero where the last block is not full; unset beyond the reach of a row.
        reach: (start, stop, places): rows start to stop of the strip cover the first `places` places.
    """

    rows: slice
    shared: Tensor
    axis: int
    width: int
    own: Tensor
    reach: list[tuple[int, int, int]] = field(default_factory=list)

    def put(self, start: int, own: Tensor) -> None:
        """Store the own factors `(c, l, d)` of the rows from `start`, over their first l places."""
        count, places, _ = own.shape
        features = self.own.shape[3]
        for block, part in zip(self.own, own.split(features, dim=2), strict=True):
            block[start : start + count, :places, : part.shape[2]] = part
            block[start : start + count, :places, part.shape[2] :] = 0
        self.reach.append((start, start + count, places))

    def factors(self) -> Iterator[tuple[Tensor, SharedFactors]]:
        """The rows of the Gram and the factors of each run of rows with one reach, as they were put."""
        for start, stop, places in self.reach:
            own = rearrange(self.own[:, start:stop, :places], "k n s f -> n s (k f)")[..., : self.width]
            rows = torch.arange(self.rows.start + start, self.rows.start + stop, device=own.device)
            yield rows, SharedFactors(own=own, shared=self.shared, axis=self.axis)


def empty_strip(rows: slice, like: SharedFactors) -> Strip:
    """A strip for the given rows of a Gram, to be filled with factors such as `like` by `put`."""
    width = like.own.shape[2]
    features = min(FEATURES, width)
    own = like.own.new_empty(-(-width // features), rows.stop - rows.start, len(like.shared), features)
    return Strip(rows=rows, shared=like.shared, axis=like.axis, width=width, own=own)


def add_strips(gram: Tensor, strips: Sequence[Strip]) -> None:
    """K += Σ over all pairs of strips of one weight and one axis. `gram` is written to.

    Cost for rows n, m and places s, t of each pair: 2 m s t d + 2 n m s d, less what lies beyond the reach of the rows.
    """
    for i, one in enumerate(strips):
        for other in strips[:i]:
            block = _pair(one, other, triangle=False).to(gram.dtype)
            gram[one.rows, other.rows] += block
            gram[other.rows, one.rows] += block.mT
        block = _pair(one, one, triangle=True).to(gram.dtype)
        gram[one.rows, one.rows] += block.tril() + block.tril(-1).mT


def _pair(one: Strip, other: Strip, *, triangle: bool) -> Tensor:
    inner = inner_products(one.shared, other.shared).to(one.own.dtype)
    count, places, features = other.own.shape[1], one.own.shape[2], other.own.shape[3]
    middle = one.own.new_zeros(count, places, features)  # stays zero for rows that were never put
    block = one.own.new_zeros(one.own.shape[1], count)
    for own, against in zip(one.own, other.own, strict=True):
        for start, stop, reach in other.reach:
            torch.matmul(inner[:, :reach], against[start:stop, :reach], out=middle[start:stop])
        for start, stop, reach in one.reach:
            columns = stop if triangle else count
            left = own[start:stop, :reach].reshape(stop - start, -1)
            block[start:stop, :columns].addmm_(left, middle[:columns, :reach].reshape(columns, -1).mT)
    return block
