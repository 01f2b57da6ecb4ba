"""Blocks of a Gram off its diagonal: the factors of some rows against those of others, which came from another rank.

K[n,m] for rows n here and m there, of one parameter: strips meet strips as in strips.py, points meet points, and any
two kinds meet by `cross_gram`. Axis order: n rows here, m rows there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.factors.by_id import cross_by_id
from fisherfunc.linalg.factors.factors import Factors, PointFactors, cross_gram, form_gradients
from fisherfunc.linalg.factors.strips import Strip, cross_strips
from fisherfunc.linalg.gram import TILE
from fisherfunc.runtime.grain import grain_of
from fisherfunc.runtime.threads import Workspace

FORMED = 2**22
"""Entries of gradients that are formed at a time where factors meet formed rows."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What is held of the gradients of some rows by one parameter; what there is of each kind adds up.

    Attributes:
        num_rows: How many rows.
        formed: The gradients themselves.
        points: One place a row, for all rows, of each use.
        strips: Many places, each of the rows of a sequence.
        wide: Whether gradients are multiplied in the dtype of the Gram.
    """

    num_rows: int
    formed: Float[Tensor, "n p"] | None = None
    points: tuple[PointFactors, ...] = ()
    strips: tuple[Strip, ...] = ()
    wide: bool = False

    def between(self, start: int, stop: int) -> "Parts":
        """Return those of the rows from `start` to before `stop`, which part no sequence, numbered from 0."""
        return Parts(
            num_rows=stop - start,
            formed=None if self.formed is None else self.formed[start:stop],
            points=tuple(_rows_of(one, start, stop) for one in self.points),
            strips=tuple(
                replace(strip, rows=slice(strip.rows.start - start, strip.rows.stop - start))
                for strip in self.strips
                if start <= strip.rows.start and strip.rows.stop <= stop
            ),
            wide=self.wide,
        )

    def packed(self) -> tuple[list[Tensor], Any]:
        """Return its tensors, and what else there is to it: small, and plain values."""
        tensors, points = ([] if self.formed is None else [self.formed]), list[Any]()
        for one in self.points:
            tensors += [one.own, one.inputs]
            points.append(one.axis)
        strips = []
        for strip in self.strips:
            reach = sorted(strip.reach)
            tensors += [strip.shared, *(strip.own[:, a:b, :places] for a, b, places in reach)]
            strips.append((strip.rows.start, strip.axis, strip.width, reach))
        return tensors, (self.num_rows, self.formed is not None, points, strips, self.wide)


def unpacked(tensors: Sequence[Tensor], about: Any) -> Parts:
    """Return what was packed, without a copy: rows of one reach are a strip of their own."""
    num_rows, formed, points, strips, wide = about
    left = iter(tensors)
    first = next(left) if formed else None
    found = [PointFactors(own=next(left), shared=next(left), axis=axis) for axis in points]
    return Parts(
        num_rows=num_rows,
        formed=first,
        points=tuple(found),
        strips=tuple(strip for entry in strips for strip in _strips(left, *entry)),
        wide=wide,
    )


def _strips(
    left: Iterator[Tensor], first: int, axis: int, width: int, reach: Sequence[tuple[int, int, int]]
) -> Iterator[Strip]:
    shared = next(left)
    for start, stop, places in reach:
        yield Strip(
            rows=slice(first + start, first + stop),
            shared=shared[:places],
            axis=axis,
            width=width,
            own=next(left),
            reach=[(0, stop - start, places)],
        )


def _rows_of(points: PointFactors, start: int, stop: int) -> PointFactors:
    return PointFactors(own=points.own[start:stop], shared=points.inputs[start:stop], axis=points.axis)


def add_crossing(block: Float[Tensor, "n m"], here: Parts, there: Parts, workspace: Workspace) -> None:
    """Block += K between the rows of two. `block` is written to.

    Cost as the contraction of rows among themselves, a pair of rows: see strips.py, triangle.py and by_id.py.

    Args:
        block: Rows of `here`, columns of `there`.
        here: Some rows.
        there: Others.
        workspace: Memory for the products of strips.
    """
    for kind, mine in _by_kind(here).items():
        for other, theirs in _by_kind(there).items():
            if not (mine and theirs):
                continue
            if kind == other == "ids" and grain_of(block.device).by_id and mine[0].axis == theirs[0].axis:
                cross_by_id(block, mine, theirs)
            elif {kind, other} <= {"strips", "ids"}:
                for axis in (0, 1):
                    along = [strip for strip in mine if strip.axis == axis]
                    cross_strips(block, along, [strip for strip in theirs if strip.axis == axis], workspace)
                    across = [strip for strip in theirs if strip.axis != axis]
                    if along and across:
                        _add_pairs(block, _pieces(along), _pieces(across))
            elif kind == other == "formed" and here.wide:
                for tile, other_tile in zip(mine[0].split(TILE, dim=1), theirs[0].split(TILE, dim=1), strict=True):
                    block += tile.to(block.dtype) @ other_tile.to(block.dtype).mT
            else:
                _add_pairs(block, _pieces(mine), _pieces(theirs))


def _by_kind(parts: Parts) -> dict[str, list[Any]]:
    vectors = [strip for strip in parts.strips if strip.shared.is_floating_point()]
    ids = [strip for strip in parts.strips if not strip.shared.is_floating_point()]
    formed = [] if parts.formed is None else [parts.formed]
    return {"strips": vectors, "ids": ids, "points": list(parts.points), "formed": formed}


Piece = tuple[Tensor | slice, Factors | Tensor]
"""Rows, and what their gradients are held as."""


def _pieces(some: Sequence[Any]) -> list[Piece]:
    """Copies of what is held, in pieces whose products are of a moderate size."""
    found: list[Piece] = []
    for one in some:
        if isinstance(one, Strip):
            found += one.factors()
        elif isinstance(one, PointFactors):
            step = grain_of(one.own.device).rows
            bounds = [(first, min(first + step, len(one.own))) for first in range(0, len(one.own), step)]
            found += [(slice(a, b), _rows_of(one, a, b)) for a, b in bounds]
        else:
            found.append((slice(0, len(one)), one))
    return found


def _add_pairs(block: Tensor, mine: Sequence[Piece], theirs: Sequence[Piece]) -> None:
    for rows, one in mine:
        for columns, other in theirs:
            at = (rows[:, None] if isinstance(rows, Tensor) and isinstance(columns, Tensor) else rows), columns
            block[at] += _product(one, other, block.dtype).to(block.dtype)


def _product(one: Factors | Tensor, other: Factors | Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        tiles = zip(one.split(TILE, dim=1), other.split(TILE, dim=1), strict=True)
        first, *rest = ((a @ b.mT).to(dtype) for a, b in tiles)
        return sum(rest, start=first)
    if isinstance(one, Tensor):
        return _product(other, one, dtype).mT
    if isinstance(other, Tensor):
        step = max(1, FORMED // other.shape[1])
        few = (_some(one, first, first + step) for first in range(0, len(one.own), step))
        return torch.cat([_formed(part, other.shape[1]).to(other) @ other.mT for part in few])
    return cross_gram(one, other)


def _some(factors: Factors, start: int, stop: int) -> Factors:
    if isinstance(factors, PointFactors):
        return _rows_of(factors, start, stop)
    return replace(factors, own=factors.own[start:stop])


def _formed(factors: Factors, size: int) -> Tensor:
    features = factors.own.shape[-1]
    shape = (features, size // features) if factors.axis == 0 else (size // features, features)
    return form_gradients(factors, shape).flatten(1)
