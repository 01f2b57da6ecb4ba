"""From the pieces of all stacks to the Gram of one parameter.

Pieces of one weight come as strips (many places, that the rows of a sequence share), as points (one place a row) or as
formed rows. Gradients of several uses add, so their Gram has all cross terms.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.factors.pieces import Piece
from fisherfunc.gradients.rows.stacks import Stack
from fisherfunc.linalg.factors.by_id import add_by_id
from fisherfunc.linalg.factors.crossing import Parts
from fisherfunc.linalg.factors.factors import PointFactors, SharedFactors, cross_gram, form_gradients
from fisherfunc.linalg.factors.strips import Strip, add_strips, cancelling, empty_strip, whole_strip
from fisherfunc.linalg.factors.triangle import Term, add_points, add_rows
from fisherfunc.linalg.gram import TILE
from fisherfunc.runtime.grain import grain_of
from fisherfunc.runtime.threads import Workspace

PAGE = 4096
"""Bytes that a system gives out at a time."""
FORMED = 2**22
"""Entries of gradients that are formed at a time where factors meet formed rows."""


class NotLookedUp(Exception):  # noqa: N818 (no error: the caller starts again without cuts)
    """A use of a tensor of which only rows that are looked up were kept is no lookup, or one of another row."""


class Holder:
    """The pieces of one parameter, held until those of all stacks are there.

    Args:
        num_rows: N.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._rows: Tensor | None = None
        self._first: Piece | None = None
        self._points: dict[tuple[int, int], PointFactors] = {}
        self._ids: Tensor | None = None
        self._own: Tensor | None = None
        self._strips: dict[tuple[int, int, int], Strip] = {}
        self._spaces: dict[int, Tensor] = {}

    def put(self, piece: Piece, stack: Stack | None) -> None:
        """Take one piece of a stack, of which nothing need be known where rows are formed.

        Raises:
            NotLookedUp: If only rows that are looked up were kept, and this is another use.
        """
        if self._ids is not None and not _is_lookup(piece.part):
            raise NotLookedUp
        if isinstance(piece.part, PointFactors):
            self._put_points(piece, piece.part)
        elif isinstance(piece.part, SharedFactors):
            assert stack is not None
            self._put_shared(piece, piece.part, stack)
        elif self._formed is None and len(piece.rows) == self._num_rows and _shows_all(piece.part):
            self._first = piece
        else:
            self._rows = self._with(piece.rows, piece.part)

    def _with(self, rows: Tensor, part: Tensor) -> Tensor:
        found = part.new_zeros(self._num_rows, part.shape[1]) if self._formed is None else self._formed
        return found.index_add_(0, rows, part)

    @property
    def _formed(self) -> Tensor | None:
        """The rows that were formed, in their order."""
        if self._first is not None:
            first, self._first = self._first, None
            assert isinstance(first.part, Tensor)
            self._rows = self._with(first.rows, first.part)
        return self._rows

    def single(self) -> Piece | None:
        """The piece of formed rows that is all that is held, in its own order."""
        held = self._rows is not None or self._strips or self._points or self._own is not None
        return None if held else self._first

    def settle(self, ids: Tensor, *, dtype: torch.dtype) -> None:
        """Make the Gram of the points that are there; of their own factors only the columns of some ids are kept.

        What comes later must be factors whose shared side is ids among these.

        Args:
            ids: In ascending order.
            dtype: Of the Gram.
        """
        points = self.points_alone()
        if points is None:
            return
        self._own = points.own.new_empty(self._num_rows, self._num_rows, dtype=dtype)
        add_points([Term(points=points.merged(), gram=self._own)], new=[self._own])
        kept = replace(points, own=points.own[:, ids])
        self._ids, self._points = ids, dict.fromkeys(self._points, kept)

    def points_alone(self) -> PointFactors | None:
        """The points of a single use, where nothing else is held and no part of their Gram was made."""
        formed = self._first is not None or self._rows is not None
        if formed or self._strips or self._own is not None or len(self._points) != 1:
            return None
        return next(iter(self._points.values()))

    def parts(self) -> Parts:
        """What is held, to be multiplied by what another rank holds; of a parameter that was not settled."""
        assert self._own is None
        strips = sorted(self._strips.values(), key=lambda strip: strip.rows.start)
        points = tuple(self._points.values())
        return Parts(num_rows=self._num_rows, formed=self._formed, points=points, strips=tuple(strips))

    def _by_kept_ids(self, part: SharedFactors) -> SharedFactors:
        """The factors with their ids as columns of the points."""
        if self._ids is None:
            return part
        columns = torch.searchsorted(self._ids, part.shared).clamp(max=len(self._ids) - 1)
        if not torch.equal(self._ids[columns], part.shared):
            raise NotLookedUp
        return SharedFactors(own=part.own, shared=columns, axis=part.axis)

    def _put_points(self, piece: Piece, part: PointFactors) -> None:
        """Points lie where all of them will: joined later, they would take twice their memory."""
        key = (piece.use, part.axis)
        if key not in self._points:
            own, shared = (side.new_zeros(self._num_rows, side.shape[1]) for side in (part.own, part.shared))
            self._points[key] = PointFactors(own=own, shared=shared, axis=part.axis)
        points = self._points[key]
        points.own[piece.rows], points.shared[piece.rows] = part.own, part.shared

    def _put_shared(self, piece: Piece, part: SharedFactors, stack: Stack) -> None:
        if not len(piece.rows) or not len(part.shared):  # all ids are padding
            return
        first, last = stack.bounds[piece.sequence]
        key = (first, piece.use, id(part.shared))
        full = stack.slots.everywhere and _shows_all(part.own, stack.width)
        whole = whole_strip(slice(first, last), part) if full and key not in self._strips else None
        if whole is not None:
            self._strips[key] = whole
            return
        if key not in self._strips:
            self._strips[key] = empty_strip(slice(first, last), part, empty=partial(self._space, piece.use))
        self._strips[key].put(piece.first - first, part.own)

    def _space(self, use: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for a strip; on a CPU out of one piece for all rows: what is let go strip by strip leaves holes."""
        if like.device.type != "cpu":  # where all that is asked for is taken
            return like.new_empty(shape)
        size = math.prod(shape)
        left = self._spaces.get(use)
        if left is None or len(left) < size:
            left = _empty(size // shape[1] * self._num_rows, like)
        self._spaces[use] = left[size:]
        return left[:size].view(*shape)

    def is_own_of(self, points: PointFactors) -> bool:
        """Whether all that is held are rows that are the own factors of some points.

        Those of a bias are, beside the weight of a linear map that acts at one place.
        """
        first = self._rows if self._first is None else self._first.part
        if not isinstance(first, Tensor) or self._strips or self._points:
            return False
        if (first.shape[1], first.dtype) != (points.own.shape[1], points.own.dtype) or first.shape[1] > TILE:
            return False  # wider ones are summed in the dtype of the Gram
        return self._formed is not None and torch.equal(self._formed, points.own)

    @property
    def strips(self) -> list[Strip]:
        """The factors that rows of one sequence share."""
        return list(self._strips.values())

    def add_to(self, gram: Tensor, workspace: Workspace | None = None, *, exact: bool | None = None) -> None:
        """K += the Gram of all that was put; `gram` is written to.

        Cost that of `add_strips`, plus N² (d + e) for points and N² p for rows.

        Args:
            gram: K.
            workspace: Memory for the contraction of strips.
            exact: See `add_strips`.

        Raises:
            NotLookedUp: If a row was looked up that was not kept.
        """
        points = list(self._points.values())
        if self._formed is not None:
            add_rows(gram, self._formed)
        if self._own is not None:
            gram += self._own
        else:
            add_points([Term(points=one.merged(), gram=gram) for one in points])
        by_axis = [[s for s in self._strips.values() if s.axis == axis] for axis in (0, 1)]
        for strips in by_axis:
            ids = not any(strip.shared.is_floating_point() for strip in strips)
            if strips and ids and grain_of(gram.device).by_id:
                add_by_id(gram, strips)
            else:
                add_strips(gram, strips, workspace, exact=exact)
        crossing = by_axis[1] if by_axis[0] else []
        crossed = [*self._strips.values()] if points or crossing or self._formed is not None else []
        if not crossed and len(points) < (2 if self._formed is None else 1):
            return
        everything = torch.arange(self._num_rows, device=gram.device)
        for i, one in enumerate(points):
            for other in points[:i]:
                _add_both(gram, everything, everything, cross_gram(one, other))
        for strip in crossed:
            for rows, part in strip.factors():  # a copy, one strip at a time
                for one in points:
                    _add_both(gram, everything, rows, cross_gram(one, self._by_kept_ids(part)))
                for other_way in crossing if strip.axis == 0 else ():
                    for columns, across in other_way.factors():
                        _add_both(gram, rows, columns, cross_gram(part, across))
                self._add_formed(gram, rows, part)
        for one in points:
            self._add_formed(gram, everything, one)

    def _add_formed(self, gram: Tensor, index: Tensor, part: PointFactors | SharedFactors) -> None:
        """K += what factors have in common with formed rows of the same parameter."""
        if self._formed is None:
            return
        everything = torch.arange(self._num_rows, device=gram.device)
        for some, formed in _formed(part, self._formed.shape[1]):
            _add_both(gram, index[some], everything, formed.to(self._formed) @ self._formed.mT)


def joined(holders: Mapping[str, Holder], label: Callable[[str], str]) -> dict[str, Holder]:
    """Put formed rows of one label side by side, which are a product then in place of many: of biases and norms, say.

    Args:
        holders: By parameter.
        label: Parameter → the label of its Gram.

    Returns:
        Holders with the same sums, by some of the parameters.
    """
    found, alike = dict(holders), dict[Any, list[str]]()
    for name, holder in holders.items():
        piece = holder.single()
        if piece is not None and isinstance(piece.part, Tensor):
            alike.setdefault((label(name), id(piece.rows), piece.part.dtype), []).append(name)
    for names in alike.values():
        pieces = [piece for piece in (found[name].single() for name in names) if piece is not None]
        parts = [piece.part for piece in pieces if isinstance(piece.part, Tensor)]
        size = sum(part.numel() * part.element_size() for part in parts)
        if len(names) > 1 and size <= grain_of(parts[0].device).middle_bytes:
            for name in names[1:]:
                del found[name]
            found[names[0]] = Holder(len(pieces[0].rows))
            found[names[0]].put(replace(pieces[0], part=torch.cat(parts, dim=1)), None)
    return found


def add_all(
    holders: dict[str, Holder], grams: Mapping[str, Tensor], label: Callable[[str], str], new: set[str]
) -> None:
    """Add the Gram of each to that of its label; those of points all together.

    Args:
        holders: By parameter; they are let go.
        grams: By label.
        label: Parameter → label.
        new: The labels of Grams with nothing in them yet, not even zeros.
    """
    terms = _terms(holders, lambda name: grams[label(name)])
    add_points(terms, new=[grams[name] for name in new])
    written = {id(gram) for term in terms for gram in (term.gram, term.own_gram)}
    del terms  # and with it the factors
    for name in new:
        if id(grams[name]) not in written:
            grams[name].zero_()
    workspace = Workspace()
    exact = cancelling({name: holder.strips for name, holder in holders.items()})
    left = joined(holders, label)
    holders.clear()
    for name in list(left):
        left.pop(name).add_to(grams[label(name)], workspace, exact=name in exact)


def _terms(holders: dict[str, Holder], gram: Callable[[str], Tensor]) -> list[Term]:
    """The points of those that hold nothing else; of two that have a product in common, by one. They are let go."""
    found = []
    for name in list(holders):
        points = holders[name].points_alone() if name in holders else None
        if points is not None:
            del holders[name]
            along = next((other for other, holder in holders.items() if holder.is_own_of(points)), None)
            own_gram = None if along is None else gram(along)
            found.append(Term(points=points.merged(), gram=gram(name), own_gram=own_gram))
            if along is not None:
                del holders[along]
    return found


def _empty(count: int, like: Tensor) -> Tensor:
    """Memory that begins with a page: a row that covers half its places then takes half its pages, and not one more."""
    each = like.element_size()
    found = like.new_empty(count + PAGE // each)
    return found[-found.data_ptr() % PAGE // each :][:count]


def _shows_all(view: Tensor, count: int = 1) -> bool:
    """Whether so many views of this size are all that is kept in memory with one of them."""
    return view.untyped_storage().nbytes() <= count * view.numel() * view.element_size()


def _is_lookup(part: object) -> bool:
    return isinstance(part, SharedFactors) and not part.shared.is_floating_point()


def _formed(part: PointFactors | SharedFactors, size: int) -> Iterator[tuple[slice, Tensor]]:
    """The gradients that factors stand for, some rows at a time: what meets formed rows of the same parameter."""
    step = max(1, FORMED // size)
    features = part.own.shape[-1]
    shape = (features, size // features) if part.axis == 0 else (size // features, features)
    for first in range(0, len(part.own), step):
        some = slice(first, first + step)
        if isinstance(part, PointFactors):
            few: PointFactors | SharedFactors = replace(part, own=part.own[some], shared=part.inputs[some], index=None)
        else:
            few = replace(part, own=part.own[some])
        yield some, form_gradients(few, shape).flatten(1)


def _add_both(gram: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> None:
    gram[rows[:, None], columns] += block.to(gram.dtype)
    gram[columns[:, None], rows] += block.mT.to(gram.dtype)
