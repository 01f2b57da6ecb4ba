"""Grams of factored gradients, block by block of features, so that what is multiplied stays in a CPU's cache.

For rows n of one sequence and m of another, K[n,m] = Σ_k ⟨own_n, (A Aᵀ) own_m⟩ over blocks k of features: the middle
product of a block is some megabytes, and no gradient and no N × S × d intermediate is formed. Rows that cover only the
first places of their sequence (a causal model) take part with those alone.

Axis order of a strip's `own`: `(k, n, s, f)`, k blocks of f features.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fisherfunc.linalg.factors.factors import SharedFactors, inner_products
from fisherfunc.runtime.grain import Grain, grain_of
from fisherfunc.runtime.threads import Workspace, side_by_side

COLUMNS = 16
"""Columns that a product is made of: the last of 63 take as long as 32 do, and most windows of a text have 2^k − 1."""
LEFT = 6
"""How many columns of zeros complete a tile; for more it is not worth it."""
CANCELS = 1e-2
"""How much of a row's squared norm round-off may take by a bound (by what is seen, a hundredth of it) before products
are taken in float64: inputs with a large part in common make factors large whose gradient is small."""

TOGETHER = 2**22
"""Entries of a side of factors that are looked at together for that, in float64."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The own factors of the rows of one sequence, for a range of the weight's features.

    Attributes:
        rows: The rows of the Gram.
        shared: `(s, e)`, what the rows share, or the ids `(s,)` of one-hot vectors.
        axis: The axis of the weight that the features lie along.
        width: How many features.
        own: `(k, n, s, f)`, zero where the last block is not full; unset beyond the reach of a row. There may be places
            more than are shared, as in `held_places`.
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
        rows, features = slice(start, start + count), self.own.shape[3]
        segment = grain_of(own.device).segment
        end = min(-(-places // segment) * segment, self.own.shape[2])
        for block, part in zip(self.own, own.split(features, dim=2), strict=True):
            block[rows, :places, : part.shape[2]] = part
            if part.shape[2] < features:
                block[rows, :places, part.shape[2] :] = 0
            if places < end:
                block[rows, places:end] = 0
        self.reach.append((start, start + count, places))

    def factors(self) -> Iterator[tuple[Tensor, SharedFactors]]:
        """The rows of the Gram and the factors of each run of rows with one reach, as they were put."""
        for start, stop, places in self.reach:
            own = rearrange(self.own[:, start:stop, :places], "k n s f -> n s (k f)")[..., : self.width]
            rows = torch.arange(self.rows.start + start, self.rows.start + stop, device=own.device)
            yield rows, SharedFactors(own=own, shared=self.shared, axis=self.axis)

    def runs(self) -> list[tuple[int, int, int]]:
        """All rows in order as (start, stop, places); those never put have no place."""
        found, last = [], 0
        for start, stop, places in sorted(self.reach):
            if start > last:
                found.append((last, start, 0))
            found.append((start, stop, places))
            last = stop
        return found if last == self.own.shape[1] else [*found, (last, self.own.shape[1], 0)]


Empty = Callable[[Sequence[int], Tensor], Tensor]
"""(shape, a tensor of the dtype and device) → a tensor to write to."""


def empty_strip(rows: slice, like: SharedFactors, *, empty: Empty | None = None) -> Strip:
    """A strip for the given rows of a Gram, to be filled with factors such as `like` by `put`.

    Args:
        rows: The rows.
        like: What it is to be filled with.
        empty: Where its factors lie; in memory where None.
    """
    width, count, grain = like.own.shape[2], rows.stop - rows.start, grain_of(like.own.device)
    places = held_places(len(like.shared), grain)
    blocks = grain.num_blocks(width)
    shape = (blocks, count, places, -(-width // blocks))
    own = like.own.new_empty(shape) if empty is None else empty(shape, like.own)
    return Strip(rows=rows, shared=like.shared, axis=like.axis, width=width, own=own)


def whole_strip(rows: slice, factors: SharedFactors) -> Strip | None:
    """A strip of factors that are all there, where they lie; None where they are not, or are to lie in blocks.

    Args:
        rows: The rows.
        factors: Theirs.
    """
    count, places, width = factors.own.shape
    if (
        count != rows.stop - rows.start
        or places != len(factors.shared)
        or grain_of(factors.own.device).num_blocks(width) > 1
    ):
        return None
    own, reach = factors.own[None], [(0, count, places)]
    return Strip(rows=rows, shared=factors.shared, axis=factors.axis, width=width, own=own, reach=reach)


def held_places(places: int, grain: Grain) -> int:
    """Places with those that complete the last segment where these are few: rows of whole segments end with a page."""
    missing = -places % grain.segment
    return places + missing if 16 * missing <= places else places


def add_strips(
    gram: Tensor, strips: Sequence[Strip], workspace: Workspace | None = None, *, exact: bool | None = None
) -> None:
    """K += Σ over all pairs of strips of one weight and one axis. `gram` is written to.

    Cost for rows n, m and places s, t of each pair: 2 m s t d + 2 n m s d, less what lies beyond the reach of the rows.

    Args:
        gram: K.
        strips: In the order of their rows.
        workspace: Memory for middle products; of its own where None.
        exact: Whether to multiply in float64; where None, if they are `cancelling`.
    """
    if not strips:
        return
    assert len({strip.own.shape[::3] for strip in strips}) == 1, "strips meet block by block"
    exact = bool(cancelling({"": strips})) if exact is None else exact
    if small_alike(strips, torch.float64 if exact else strips[0].own.dtype):
        everyone = slice(strips[0].rows.start, strips[-1].rows.stop)
        gram[everyone, everyone].add_(_at_once(strips, torch.float64 if exact else strips[0].own.dtype))
        return
    pairs = [(one, others) for i, one in enumerate(strips) for others in ((), *_groups(strips[:i], one))]
    pairs.sort(key=lambda pair: sum(map(_num_rows, pair[1])), reverse=True)  # the longest first, themselves last
    way = _double if exact else _as_it_is
    tasks = [partial(_product, way, one, others) for one, others in pairs]
    largest = max(one.own[0, 0].numel() * _whole_tiles(sum(map(_num_rows, others or (one,)))) for one, others in pairs)
    like = strips[0].own.new_empty(0, dtype=torch.float64) if exact else strips[0].own
    found = side_by_side(tasks, size=largest, like=like, workspace=workspace or Workspace())
    for (one, others), block in zip(pairs, found, strict=True):
        _add_block(gram, one, others, block)


def small_alike(strips: Sequence[Strip], dtype: torch.dtype) -> bool:
    """Return whether strips are of neighbours of one shape, and both halves of K cost less than one pair by pair.

    Args:
        strips: In the order of their rows.
        dtype: Of the products.
    """
    first, count, grain = strips[0], len(strips), grain_of(strips[0].own.device)
    blocks, rows, _, features = first.own.shape
    places = len(first.shared)
    if count < 2 or blocks > 1 or dtype.itemsize < 4:
        return False
    for one, after in zip(strips, [*strips[1:], None], strict=True):
        shapes = (one.own.shape, one.shared.shape) == (first.own.shape, first.shared.shape)
        adjacent = after is None or one.rows.stop == after.rows.start
        if not (shapes and adjacent and one.reach == [(0, rows, places)]):
            return False
    middle = count * rows * count * places * features
    inner = (count * places) ** 2 * (1 + rows)  # that of each row is a copy
    operations = middle * (places + rows)  # of one half: two for each product
    return dtype.itemsize * max(middle, inner) <= grain.middle_bytes and operations <= grain.call * count * (count + 1)


def _at_once(strips: Sequence[Strip], dtype: torch.dtype) -> Float[Tensor, "n n"]:
    """The Gram of strips of one shape by two batched products: a few kernels, whatever their number.

    Cost 2 n (b s) s d + 2 n² s d for n rows of b strips.
    """
    places = len(strips[0].shared)
    own = torch.stack([strip.own[0, :, :places] for strip in strips]).to(dtype)
    count, rows = own.shape[:2]
    shared = torch.cat([strip.shared for strip in strips])
    shared = shared.to(dtype) if shared.is_floating_point() else shared
    inner = inner_products(shared, shared).to(dtype)
    inner = rearrange(inner, "x (c t) -> c x t", c=count)[:, None].expand(-1, rows, -1, -1)
    middle = torch.bmm(inner.flatten(0, 1), own.flatten(0, 1))
    middle = rearrange(middle, "m (b s) f -> b (s f) m", b=count)
    return torch.bmm(own.flatten(2), middle).flatten(0, 1)


def cross_strips(
    block: Float[Tensor, "n m"], strips: Sequence[Strip], others: Sequence[Strip], workspace: Workspace
) -> None:
    """Block += K between the rows of strips and those of others. `block` is written to.

    Cost 2 d (n m s) for each pair of strips: of products that are none of a strip with itself, as in `add_strips`.

    Args:
        block: Rows of `strips`, columns of `others`.
        strips: In the order of their rows.
        others: In the order of theirs, of the same axis.
        workspace: Memory for middle products.
    """
    if not strips or not others:
        return
    exact = bool(cancelling({"": (*strips, *others)}))
    way = _double if exact else _as_it_is
    pairs = [(one, group) for one in strips for group in _groups(others, one)]
    tasks = [partial(_product, way, one, group) for one, group in pairs]
    largest = max(one.own[0, 0].numel() * _whole_tiles(sum(map(_num_rows, group))) for one, group in pairs)
    like = strips[0].own.new_empty(0, dtype=torch.float64) if exact else strips[0].own
    found = side_by_side(tasks, size=largest, like=like, workspace=workspace)
    for (one, group), product in zip(pairs, found, strict=True):
        runs = _adjacent(group)
        for rows, part in zip(runs, product.split([rows.stop - rows.start for rows in runs], dim=1), strict=True):
            block[one.rows, rows].add_(part)


def _product(way: Callable[[Strip], Strip], one: Strip, others: Sequence[Strip], space: Tensor) -> Tensor:
    return _against(way(one), [way(other) for other in others], space) if others else _itself(way(one), space)


def _as_it_is(strip: Strip) -> Strip:
    return strip


def _double(strip: Strip) -> Strip:
    shared = strip.shared.double() if strip.shared.is_floating_point() else strip.shared
    return replace(strip, own=strip.own.double(), shared=shared)


def cancelling(strips: Mapping[str, Sequence[Strip]]) -> set[str]:
    """Return those of some weights whose float32 sums over places lose what they are to give, by a bound for some rows.

    For δ_s and a_s at places s: eps (Σ_s ‖δ_s‖ ‖a_s‖)² against ‖Σ_s δ_s ⊗ a_s‖². Strips of one shape are looked at
    together, of whichever weight, as each look is a dozen small operations.

    Args:
        strips: {weight: its strips}.
    """
    alike: dict[tuple[int, ...], list[tuple[str, Tensor, Tensor]]] = {}
    for name, some in strips.items():
        for strip in some:
            if strip.own.dtype != torch.float32 or not strip.shared.is_floating_point():
                continue
            for _, stop, places in _some(strip.runs()):
                if places:  # rows that were never put have nothing to lose
                    own, shared = strip.own[:, stop - 1, :places], strip.shared[:places]
                    alike.setdefault((*own.shape, shared.shape[1]), []).append((name, own, shared))
    names: list[str] = []
    lose: list[Tensor] = []
    for group in alike.values():
        each = max(1, TOGETHER // max(side.numel() for side in group[0][1:]))
        for first in range(0, len(group), each):
            of, *sides = zip(*group[first : first + each], strict=True)
            names += of
            lose.append(_lose(*(torch.stack(side).double() for side in sides)))
    flags = torch.cat(lose).tolist() if lose else []
    return {name for name, flag in zip(names, flags, strict=True) if flag}


def _lose(own: Float[Tensor, "g k s f"], shared: Float[Tensor, "g s e"]) -> Tensor:
    inner = shared @ shared.mT  # (g, s, s)
    sizes = inner.diagonal(dim1=1, dim2=2).sqrt()
    lost = (own.square().sum(dim=(1, 3)).sqrt() * sizes).sum(dim=1).square()
    left = (own * (inner[:, None] @ own)).sum(dim=(1, 2, 3))
    return torch.finfo(torch.float32).eps * lost > CANCELS * left


def _some(runs: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The first, one in the middle and the last, each once."""
    return [runs[i] for i in sorted({0, len(runs) // 2, len(runs) - 1})]


def _add_block(gram: Tensor, one: Strip, others: Sequence[Strip], block: Tensor) -> None:
    if not others and len(one.runs()) == 1:  # all of it is right
        gram[one.rows, one.rows].add_(block)
        return
    if not others:
        gram[one.rows, one.rows].add_(block.triu()).add_(block.triu(1).mT)
        return
    runs = _adjacent(others)
    for rows, part in zip(runs, block.split([rows.stop - rows.start for rows in runs], dim=1), strict=True):
        gram[one.rows, rows].add_(part)  # one by one: two uses of one sequence have the same rows
        gram[rows, one.rows].add_(part.mT)


def _adjacent(strips: Sequence[Strip]) -> list[slice]:
    """The rows of strips in their order, those that follow on each other together."""
    found: list[slice] = []
    for strip in strips:
        if found and found[-1].stop == strip.rows.start:
            found[-1] = slice(found[-1].start, strip.rows.stop)
        else:
            found.append(strip.rows)
    return found


def _groups(strips: Sequence[Strip], one: Strip) -> Iterator[list[Strip]]:
    """Strips whose middle products with `one`, and shared factors, take no more together than suits the device."""
    group: list[Strip] = []
    room = most = grain_of(one.own.device).middle_bytes
    row_bytes = one.own[0, 0].numel() * one.own.element_size()
    for strip in strips:
        taken = max(_num_rows(strip) * row_bytes, strip.shared.numel() * strip.shared.element_size())
        if group and taken > room:
            yield group
            group, room = [], most
        group.append(strip)
        room -= taken
    if group:
        yield group


def _against(one: Strip, others: Sequence[Strip], space: Tensor) -> Tensor:
    """⟨own_n, (A Aᵀ) own_m⟩ for the rows of a strip and those of others, side by side. `space` is written to."""
    beyond = one.own.shape[2] - len(one.shared)  # places that complete a segment
    alike = groupby(others, key=lambda other: other.shared.ndim)  # ids, or vectors
    inners = [inner for _, some in alike for inner in _inners(one, list(some))]
    inners = [functional.pad(inner, (0, 0, 0, beyond)) if beyond else inner for inner in inners]
    counts = list(map(_num_rows, others))
    middle = _middle(space, one, sum(counts))
    segments = list(_segments(one.runs(), one.own.shape[2], grain_of(one.own.device).segment))

    def products() -> Iterator[_Product]:
        for k, own in enumerate(one.own):
            for inner, other, part in zip(inners, others, middle[: sum(counts)].split(counts), strict=True):
                _multiply(inner, other.own[k], other.runs(), part)
            yield from ((rows, 0, own[rows, places], middle[:, places]) for rows, places in segments)

    return _summed(one, len(middle), products())[:, : sum(counts)]


def _itself(one: Strip, space: Tensor) -> Tensor:
    """The same for a strip and itself; only the upper triangle is right. `space` is written to.

    Of two rows the first covers fewer places, so that its own factor has less to be multiplied by.
    """
    inner = inner_products(one.shared, one.shared).to(one.own.dtype)
    middle = _middle(space, one, _num_rows(one))
    runs = one.runs()
    farthest = list(accumulate((places for _, _, places in runs), max))  # what rows up to here multiply by

    def products() -> Iterator[_Product]:
        for own in one.own:
            for (start, stop, places), most in zip(runs, farthest, strict=True):
                _multiply(inner[:most], own, [(start, stop, places)], middle[:, :most])
            for start, stop, places in runs:
                yield slice(start, stop), start, own[start:stop, :places], middle[start:, :places]

    return _summed(one, len(middle), products())[:, : _num_rows(one)]


_Product = tuple[slice, int, Tensor, Tensor]
"""Rows of a block, its first column, and `(n, s, f)` and `(m, s, f)`, whose products over s and f are added there."""


def _summed(one: Strip, count: int, products: Iterable[_Product]) -> Tensor:
    """A block of the rows of a strip and so many others; products of low precision are summed in float32 at least."""
    dtype = one.own.dtype if one.own.dtype.itemsize > 4 else torch.float32
    block: Tensor | None = None
    for rows, first, left, right in products:
        if block is None and left.shape[0] == _num_rows(one) and not first:
            block = (left.flatten(1) @ right.flatten(1).mT).to(dtype)
            continue
        if block is None:
            block = left.new_zeros(_num_rows(one), count, dtype=dtype)
        if dtype == left.dtype:
            block[rows, first:].addmm_(left.flatten(1), right.flatten(1).mT)
        else:
            block[rows, first:] += left.flatten(1) @ right.flatten(1).mT
    return one.own.new_zeros(_num_rows(one), count, dtype=dtype) if block is None else block


def _inners(one: Strip, others: Sequence[Strip]) -> tuple[Tensor, ...]:
    """A Aᵀ with each of the others: one product."""
    shared = others[0].shared if len(others) == 1 else torch.cat([other.shared for other in others])
    found = inner_products(one.shared, shared).to(one.own.dtype)
    return found.split([len(other.shared) for other in others], dim=1)


def _middle(space: Tensor, one: Strip, count: int) -> Tensor:
    """Room for the middle products of some rows, and after them what completes a tile and is multiplied in vain."""
    shape = (_whole_tiles(count), *one.own.shape[2:])
    found = space[: math.prod(shape)].view(shape)
    return found


def _whole_tiles(count: int) -> int:
    missing = -count % COLUMNS
    return count + missing if missing <= LEFT else count


def _num_rows(strip: Strip) -> int:
    return strip.own.shape[1]


def _segments(runs: Sequence[tuple[int, int, int]], places: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Segments of places, each with the adjacent rows that reach into it."""
    for first in range(0, places, size):
        segment = slice(first, min(first + size, places))
        for reaching, adjacent in groupby(runs, key=lambda run: run[2] > segment.start):
            if reaching:
                members = list(adjacent)
                yield slice(members[0][0], members[-1][1]), segment


def _multiply(inner: Tensor, own: Tensor, runs: Sequence[tuple[int, int, int]], out: Tensor) -> None:
    """(A Aᵀ) own_m for each row, from the places that it covers. `out` is written to."""
    if runs == [(0, *own.shape[:2])] and inner.shape[1] == own.shape[1]:  # nothing to be cut out
        torch.bmm(inner.expand(len(own), -1, -1), own, out=out[: len(own)])
        return
    for start, stop, places in runs:
        torch.bmm(inner[:, :places].expand(stop - start, -1, -1), own[start:stop, :places], out=out[start:stop])
