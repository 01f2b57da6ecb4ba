"""Symmetric products by tiles of their lower triangle: half the operations, and temporaries that stay in the cache.

Products are in the dtype of the rows (at least float32), sums over wide rows in that of the Gram. Axis order `(n, p)`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.factors import PointFactors
from fisherfunc.linalg.gram import TILE

ROWS = 512


def add_rows(gram: Float[Tensor, "n n"], rows: Float[Tensor, "n p"]) -> None:
    """K += G Gᵀ. Cost N² P operations. `gram` is written to."""

    def product(some: slice, others: slice) -> Tensor:
        total = gram.new_zeros(some.stop - some.start, others.stop - others.start)
        for tile in range(0, rows.shape[1], TILE):
            total += rows[some, tile : tile + TILE] @ rows[others, tile : tile + TILE].mT
        return total

    _add_lower(gram, product)


def add_points(gram: Float[Tensor, "n n"], index: Int[Tensor, " m"], points: PointFactors) -> None:
    """K += (L Lᵀ) ∘ (R Rᵀ) at the rows and columns of `index`. Cost M² (d + e) operations. `gram` is written to."""

    def product(some: slice, others: slice) -> Tensor:
        found = points.left[some] @ points.left[others].mT
        return found.mul_(points.right[some] @ points.right[others].mT)

    if len(index) == len(gram):  # all rows in order
        _add_lower(gram, product)
    else:
        block = torch.zeros(len(index), len(index), dtype=gram.dtype, device=gram.device)
        _add_lower(block, product)
        gram[index[:, None], index] += block


def _add_lower(gram: Tensor, product: Callable[[slice, slice], Tensor]) -> None:
    """Add a symmetric matrix, given by its tiles."""
    count = len(gram)
    for start in range(0, count, ROWS):
        some = slice(start, min(start + ROWS, count))
        for first in range(0, some.stop, ROWS):
            others = slice(first, min(first + ROWS, some.stop))
            tile = product(some, others)
            gram[some, others] += tile
            if others.start != some.start:
                gram[others, some] += tile.mT
