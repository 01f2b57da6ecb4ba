"""From the pieces of all sequences to the Gram of one parameter.

Pieces of one weight come as strips (many places, that the rows of a sequence share), as points (one place a row) or as
formed rows. Gradients of several uses add, so their Gram has all cross terms.
"""

from collections import defaultdict

import torch
from torch import Tensor

from fisherfunc.gradients.factored.collect import Piece
from fisherfunc.linalg.factors import PointFactors, SharedFactors, cross_gram
from fisherfunc.linalg.gram import accumulate_rows
from fisherfunc.linalg.strips import Strip, add_strips, empty_strip


class Holder:
    """The pieces of one parameter, held until those of all sequences are there.

    Args:
        num_rows: N.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._rows: Tensor | None = None
        self._points: dict[int, list[tuple[slice, PointFactors]]] = defaultdict(list)
        self._strips: dict[tuple[int, int, int], Strip] = {}

    def put(self, piece: Piece, sequence: slice) -> None:
        """Take one piece; `sequence` are the rows of the Gram that belong to its sequence."""
        if isinstance(piece.part, PointFactors):
            self._points[piece.use].append((piece.rows, piece.part))
        elif isinstance(piece.part, SharedFactors):
            key = (sequence.start, piece.use, id(piece.part.shared))
            if key not in self._strips:
                self._strips[key] = empty_strip(sequence, piece.part)
            self._strips[key].put(piece.rows.start - sequence.start, piece.part.own)
        else:
            self._add_rows(piece.rows, piece.part)

    def gram(self, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The Gram of all that was put. Cost that of `add_strips`, plus 2 N² (d + e) for points and 2 N² p for rows."""
        gram = torch.zeros(self._num_rows, self._num_rows, dtype=dtype, device=device)
        if self._rows is not None:
            accumulate_rows(gram, self._rows)
        by_axis = [[s for s in self._strips.values() if s.axis == axis] for axis in (0, 1)]
        for strips in by_axis:
            add_strips(gram, strips)
        points = [_joined(parts, gram.device) for parts in self._points.values()]
        for i, (rows, one) in enumerate(points):
            gram[rows[:, None], rows] += cross_gram(one, one).to(dtype)
            for columns, other in points[:i]:
                _add_both(gram, rows, columns, cross_gram(one, other))
        along = [[part for strip in strips for part in strip.factors()] for strips in by_axis]
        for rows, point in points:
            for columns, strip in along[0] + along[1]:
                _add_both(gram, rows, columns, cross_gram(point, strip))
        for rows, one_way in along[0]:
            for columns, other_way in along[1]:
                _add_both(gram, rows, columns, cross_gram(one_way, other_way))
        return gram

    def _add_rows(self, rows: slice, part: Tensor) -> None:
        if self._rows is None:
            self._rows = part.new_zeros(self._num_rows, part.shape[1])
        self._rows[rows] += part


def _joined(parts: list[tuple[slice, PointFactors]], device: torch.device) -> tuple[Tensor, PointFactors]:
    """The points of one use in all sequences, and their rows of the Gram."""
    index = torch.cat([torch.arange(rows.start, rows.stop, device=device) for rows, _ in parts])
    left, right = (torch.cat([getattr(part, side) for _, part in parts]) for side in ("left", "right"))
    return index, PointFactors(left=left, right=right)


def _add_both(gram: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> None:
    gram[rows[:, None], columns] += block.to(gram.dtype)
    gram[columns[:, None], rows] += block.mT.to(gram.dtype)
