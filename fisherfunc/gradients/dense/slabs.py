"""How the columns of the gradient matrix are cut so that rows of all tokens fit the memory limit.

A slab is a set of columns for which the rows of all N tokens are held at once; one backward pass of every token
fills it. Small memory means more slabs and more passes, and the same Grams. Tensors are cut at multiples of `TILE`
columns, the unit in which Grams are accumulated, so that the order of summation does not depend on the cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fisherfunc.linalg.gram import TILE

DEFAULT_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns `start` to `stop` of one parameter's gradient, flattened (or of its sampled coordinates)."""

    name: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """How many columns."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class DensePlan:
    """The cut, and what it needs.

    Attributes:
        chunk_size: Tokens a batched backward pass.
        slabs: The columns of each pass over all tokens.
        peak_bytes: The estimated peak beyond the model itself.
    """

    chunk_size: int
    slabs: tuple[tuple[Columns, ...], ...]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a dense pass holds, in bytes.

    Attributes:
        num_tokens: N.
        itemsize: Of a gradient entry.
        gram_itemsize: Of a Gram entry.
        graph: The tensors that a forward pass saves.
        largest: Entries of the largest parameter: of a tied one, two gradients are held beside their sum.
        cotangent: What a backward pass holds a token beside the gradients.
    """

    num_tokens: int
    itemsize: int
    gram_itemsize: int
    graph: int
    largest: int
    cotangent: int

    def fixed(self, num_tensors: int) -> int:
        """Grams, one product, one tile, the graph."""
        grams = (num_tensors + 1) * self.num_tokens**2 * self.gram_itemsize
        return grams + self.num_tokens * TILE * self.gram_itemsize + self.graph

    def backward(self, chunk_size: int, num_params: int) -> int:
        """A batched backward pass for a chunk: its gradients, two in the making, its cotangents."""
        return chunk_size * ((num_params + 2 * self.largest) * self.itemsize + self.cotangent)

    def rows(self, width: int) -> int:
        """The rows of all tokens for `width` columns."""
        return self.num_tokens * width * self.itemsize


def cut(
    num_params: Mapping[str, int],
    num_columns: Mapping[str, int],
    footprint: Footprint,
    *,
    memory_limit: int,
    chunk_size: int | None = None,
    num_grams: int | None = None,
) -> DensePlan:
    """Slabs filled in the order of the parameters, for the largest chunk that leaves half the room for rows.

    Args:
        num_params: {name: P_p}; a backward pass forms the whole gradient of a tensor.
        num_columns: {name: columns wanted}; less than P_p where coordinates are sampled.
        footprint: What the parts of the pass hold.
        memory_limit: In bytes.
        chunk_size: Tokens a backward pass; at most `DEFAULT_CHUNK` where None.
        num_grams: How many Grams are accumulated; one a parameter where None.

    Raises:
        ValueError: If the limit is below the smallest chunk; it says how much is needed.
    """
    chunk_size = None if chunk_size is None else min(chunk_size, footprint.num_tokens)
    num_grams = len(num_params) if num_grams is None else num_grams
    fixed = footprint.fixed(num_grams)
    largest = max(num_params.values())
    widest = min(TILE, max(num_columns.values()))
    least = fixed + footprint.backward(chunk_size or 1, largest) + footprint.rows(widest)
    if memory_limit < least:
        raise ValueError(
            f"memory_limit={memory_limit} bytes is below the {least} bytes ({least / 2**20:.0f} MiB) that the smallest "
            f"chunk needs: {num_grams} Grams of {footprint.num_tokens} tokens ({fixed} bytes with work space) "
            f"and {chunk_size or 1} gradient(s) of the largest tensor, {largest} entries; raise the limit or lower "
            "num_tokens"
        )
    free = memory_limit - fixed
    chunk = chunk_size or _largest_chunk(footprint, largest, free - footprint.rows(widest))
    slabs = _fill(num_params, num_columns, footprint, chunk, free)
    peak = fixed + max(_slab_bytes(slab, num_params, footprint, chunk) for slab in slabs)
    return DensePlan(chunk_size=chunk, slabs=slabs, peak_bytes=peak)


def _largest_chunk(footprint: Footprint, largest: int, free: int) -> int:
    most = min(DEFAULT_CHUNK, footprint.num_tokens)
    affordable = [c for c in range(1, most + 1) if footprint.backward(c, largest) <= max(free // 2, 1)]
    return max(affordable, default=1)


def _fill(
    num_params: Mapping[str, int], num_columns: Mapping[str, int], footprint: Footprint, chunk: int, free: int
) -> tuple[tuple[Columns, ...], ...]:
    slabs: list[list[Columns]] = [[]]
    left = free - footprint.backward(chunk, 0)
    room = left
    for name, total in num_columns.items():
        gradient = footprint.backward(chunk, num_params[name]) - footprint.backward(chunk, 0)
        start = 0
        while start < total:
            width = _affordable_width(total - start, room - gradient, footprint)
            if width == 0:
                slabs.append([])
                room = left
                continue
            slabs[-1].append(Columns(name=name, start=start, stop=start + width))
            room -= gradient + footprint.rows(width)
            start += width
    return tuple(tuple(slab) for slab in slabs if slab)


def _affordable_width(wanted: int, room: int, footprint: Footprint) -> int:
    if footprint.rows(wanted) <= room:
        return wanted
    return max(room, 0) // footprint.rows(TILE) * TILE


def _slab_bytes(slab: tuple[Columns, ...], num_params: Mapping[str, int], footprint: Footprint, chunk: int) -> int:
    touched = sum(num_params[columns.name] for columns in slab)
    return footprint.backward(chunk, touched) + footprint.rows(sum(columns.width for columns in slab))
