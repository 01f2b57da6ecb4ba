"""Symmetric products by tiles of their lower triangle: half the operations, and temporaries that stay in the cache.

Products are in the dtype of the rows (at least float32), sums over wide rows in that of the Gram. Axis order `(n, p)`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.factors import PointFactors
from fisherfunc.linalg.gram import TILE

ROWS = 512


def add_rows(gram: Float[Tensor, "n n"], rows: Float[Tensor, "n p"]) -> None:
    """K += G Gᵀ. Cost N² P operations. `gram` is written to."""

    def product(some: slice, others: slice) -> list[Tensor]:
        total = gram.new_zeros(some.stop - some.start, others.stop - others.start)
        for tile in range(0, rows.shape[1], TILE):
            total += rows[some, tile : tile + TILE] @ rows[others, tile : tile + TILE].mT
        return [total]

    _add_lower([gram], product)


def add_points(
    gram: Float[Tensor, "n n"],
    index: Int[Tensor, " m"],
    points: PointFactors,
    *,
    left_gram: Float[Tensor, "n n"] | None = None,
    over: bool = False,
) -> None:
    """K += (L Lᵀ) ∘ (R Rᵀ) at the rows and columns of `index`. Cost M² (d + e) operations. `gram` is written to.

    Where `left_gram` is given, L Lᵀ is added to it as well, at no further cost. With `over`, both are written over, not
    added to. Either asks for an `index` of all rows in order.
    """

    def product(some: slice, others: slice) -> Iterator[Tensor]:
        found = points.left[some] @ points.left[others].mT
        if left_gram is not None:
            yield found
        yield found.mul_(points.right[some] @ points.right[others].mT)

    if len(index) == len(gram):  # all rows in order
        _add_lower([gram] if left_gram is None else [left_gram, gram], product, over=over)
    else:
        block = torch.zeros(len(index), len(index), dtype=gram.dtype, device=gram.device)
        _add_lower([block], product)
        gram[index[:, None], index] += block


def _add_lower(
    grams: Sequence[Tensor], products: Callable[[slice, slice], Iterable[Tensor]], *, over: bool = False
) -> None:
    """Add a symmetric matrix to each, or write it over, given by tiles; each is taken before the next one is made."""
    count = len(grams[0])
    for start in range(0, count, ROWS):
        some = slice(start, min(start + ROWS, count))
        for first in range(0, some.stop, ROWS):
            others = slice(first, min(first + ROWS, some.stop))
            for gram, tile in zip(grams, products(some, others), strict=True):
                places = [(some, others, tile)]
                if others.start != some.start:
                    places.append((others, some, tile.mT.contiguous()))
                for rows, columns, part in places:
                    if over:
                        gram[rows, columns] = part
                    else:
                        gram[rows, columns] += part
