"""Symmetric products by tiles of their lower triangle: half the operations, and temporaries that stay in the cache.

Products are in the dtype of the rows, sums over wide rows in that of the Gram. Axis order `(n, p)`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.factors.factors import PointFactors
from fisherfunc.linalg.gram import TILE
from fisherfunc.runtime.grain import grain_of


def add_rows(gram: Float[Tensor, "n n"], rows: Float[Tensor, "n p"]) -> None:
    """K += G Gᵀ. Cost N² P operations. `gram` is written to."""
    for some, others in _tiles(gram):
        product_bytes = (some.stop - some.start) * (others.stop - others.start) * rows.element_size()
        together = max(1, grain_of(gram.device).middle_bytes // product_bytes)
        for left, right in zip(_columns(rows[some], together), _columns(rows[others], together), strict=True):
            products = torch.bmm(left, right.mT)
            total = products[0] if len(products) == 1 else products.sum(dim=0, dtype=gram.dtype)
            gram[some, others].add_(total)
        _mirror(gram, some, others)


def _columns(rows: Float[Tensor, "n p"], together: int) -> Iterator[Float[Tensor, "t n q"]]:
    """Tiles of columns, so many together; what is left of a whole one comes last."""
    count = rows.shape[1] // TILE
    if count:
        yield from rows[:, : count * TILE].unflatten(1, (count, TILE)).transpose(0, 1).split(together)
    if count * TILE < rows.shape[1]:
        yield rows[None, :, count * TILE :]


@dataclass(frozen=True, kw_only=True)
class Term:
    """What points add to Grams.

    Attributes:
        points: (Δ, A).
        gram: To this one, (Δ Δᵀ) ∘ (A Aᵀ).
        own_gram: To this one, Δ Δᵀ, at no further cost; it may be the same. None where it is not wanted.
    """

    points: PointFactors
    gram: Float[Tensor, "n n"]
    own_gram: Float[Tensor, "n n"] | None = None

    def products(self, some: slice, others: slice, space: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each Gram and what is added to a tile of it, which holds until the next is asked for. `space` is written to.

        Args:
            some: Rows.
            others: Columns.
            space: `(2, k)` for two tiles.
        """
        shape = (some.stop - some.start, others.stop - others.start)
        own, inputs = (part[: shape[0] * shape[1]].view(shape) for part in space)
        torch.mm(self.points.own[some], self.points.own[others].mT, out=own)
        self._inputs(some, others, inputs)
        if self.own_gram is self.gram:
            inputs += 1
        elif self.own_gram is not None:
            yield self.own_gram, own
        yield self.gram, own.mul_(inputs)

    def _inputs(self, some: slice, others: slice, out: Tensor) -> None:
        """A Aᵀ at a tile: of inputs that several rows have, once. `out` is written to."""
        shared, index = self.points.shared, self.points.index
        if index is None:
            torch.mm(shared[some], shared[others].mT, out=out)
            return
        first, second = index[some], index[others]
        left, right = shared[first[0] : first[-1] + 1], shared[second[0] : second[-1] + 1]
        product = torch.mm(left, right.mT, out=shared.new_empty(len(left), len(right)))
        torch.index_select(product.index_select(0, first - first[0]), 1, second - second[0], out=out)


def add_points(terms: Sequence[Term], *, new: Sequence[Tensor] = ()) -> None:
    """Add what all terms come to, tile by tile, so that a Gram of several terms is written once. Grams are written to.

    Cost N² (d + e) operations a term, N² d + M² e where there are M inputs.

    Args:
        terms: With Grams of one size.
        new: Those of the Grams with nothing in them yet, not even zeros.
    """
    grams = {id(gram): gram for term in terms for gram in (term.gram, term.own_gram) if gram is not None}
    spaces = {term.points.own.dtype: term.points.own for term in terms}
    spaces = {
        dtype: like.new_empty(2, min(grain_of(like.device).rows, len(like)) ** 2) for dtype, like in spaces.items()
    }
    for some, others in _tiles(terms[0].gram) if terms else ():
        unset = set(map(id, new))
        for term in terms:
            for gram, tile in term.products(some, others, spaces[term.points.own.dtype]):
                if id(gram) in unset:
                    gram[some, others] = tile
                    unset.remove(id(gram))
                else:
                    gram[some, others].add_(tile)
        for gram in grams.values():
            _mirror(gram, some, others)


def _tiles(gram: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the tiles of a lower triangle."""
    count, size = len(gram), grain_of(gram.device).rows
    for start in range(0, count, size):
        some = slice(start, min(start + size, count))
        for first in range(0, some.stop, size):
            yield some, slice(first, min(first + size, some.stop))


def _mirror(gram: Tensor, some: slice, others: slice) -> None:
    if others.start != some.start:
        gram[others, some] = gram[some, others].mT
