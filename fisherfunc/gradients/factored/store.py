"""The pieces of one stack as a file: what they share they share again, and memory is laid out as it was.

So a pass that reads them goes on to the same bits: products depend on strides and alignment, and strips are told apart
by the very input that their pieces share. The file holds each stretch of memory once; the header says which tensors
are views of it, and of which tensors each piece is made. Other tensors of the stack (its cotangents at a boundary, say)
may go beside the pieces, by name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.checkpoint import Checkpoint, stage_of
from fisherfunc.gradients.factored.pieces import Piece
from fisherfunc.linalg.factors import PointFactors, SharedFactors
from fisherfunc.records.axes import Progress

ALIGNMENT = 64
"""To how many bytes memory is aligned: what a vector register holds."""


def pieces_through(
    checkpoint: Checkpoint, group: int, stack: int, compute: Callable[[], Iterator[Piece]], device: torch.device
) -> Iterable[Piece]:
    """The pieces of a stack, read where they are kept; else computed, and kept once all of them are there.

    Args:
        checkpoint: Where they are kept. Nowhere: they are handed on one by one.
        group: The number of the group of parameters.
        stack: The number of the stack.
        compute: What gives the pieces.
        device: Of the pass.
    """
    if not checkpoint.keeps:
        return compute()
    found = checkpoint.read(part_of(group, stack))
    if found is not None:
        return unpacked(*found, device=device)[0]
    pieces = list(compute())
    checkpoint.write(part_of(group, stack), *packed(pieces))
    return pieces


def part_of(group: int, stack: int | None = None) -> str:
    """The name of the part that holds the pieces of a stack; how those of a whole group begin."""
    return f"pieces-{group}-{'' if stack is None else stack}"


class Passes:
    """Counts what is passed over, first of all what an earlier run has kept.

    Args:
        checkpoint: Where that is kept.
        sizes: The tokens of each stack.
        num_groups: How many times they are passed over.
        progress: Called with the token passes done and their total.
    """

    def __init__(
        self, checkpoint: Checkpoint, sizes: Sequence[int], num_groups: int, progress: Progress | None
    ) -> None:
        self._progress, self._total = progress, sum(sizes) * num_groups
        self._kept = {
            (group, stack)
            for group in range(num_groups)
            for stack in range(len(sizes))
            if checkpoint.has(stage_of(group)) or checkpoint.has(part_of(group, stack))
        }
        self._done = sum(sizes[stack] for _, stack in self._kept)
        if self._kept:
            self._report()

    def of(self, group: int, stack: int) -> Callable[[int], None]:
        """What to call with the tokens passed over in a stack; those that were kept count once, even if damaged."""

        def passed(count: int) -> None:
            self._done += count if (group, stack) not in self._kept else 0
            self._report()

        return passed

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)


def packed(pieces: Sequence[Piece], named: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], Any]:
    """Pieces and named tensors as the tensors and the header of a file."""
    memory: dict[Any, int] = {}
    views: dict[int, int] = {}
    kept: list[Tensor] = []
    tensors: dict[str, Tensor] = {}
    layout: list[Any] = []

    def put(tensor: Tensor) -> int:
        if id(tensor) not in views:
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            number = memory.setdefault(key, len(memory))
            tensors.setdefault(str(number), tensor.detach())
            views[id(tensor)] = len(layout)
            layout.append([number, tensor.stride(), tensor.data_ptr() % ALIGNMENT])
            kept.append(tensor)  # alive, so that an id stays its own
        return views[id(tensor)]

    header = {
        "pieces": [_described(piece, put) for piece in pieces],
        "named": {name: put(tensor) for name, tensor in (named or {}).items()},
        "views": layout,
    }
    return tensors, header


def unpacked(
    tensors: Mapping[str, Tensor], header: Any, *, device: torch.device
) -> tuple[list[Piece], dict[str, Tensor]]:
    """What `packed` was given, on a device."""
    memory: dict[int, Tensor] = {}

    def view(number: int, stride: Sequence[int], offset: int) -> Tensor:
        if number not in memory:
            memory[number] = _placed(tensors[str(number)], stride, offset, device)
        return memory[number].view_as(memory[number])

    views = [view(*entry) for entry in header["views"]]
    return [_piece(entry, views) for entry in header["pieces"]], {n: views[v] for n, v in header["named"].items()}


def _described(piece: Piece, put: Callable[[Tensor], int]) -> dict[str, Any]:
    part = piece.part
    if isinstance(part, SharedFactors):
        kind, parts, axis = "shared", [put(part.own), put(part.shared)], part.axis
    elif isinstance(part, PointFactors):
        kind, parts, axis = "point", [put(part.own), put(part.shared)], part.axis
    else:
        kind, parts, axis = "rows", [put(part)], 0
    found = {"name": piece.name, "use": piece.use, "sequence": piece.sequence, "rows": put(piece.rows)}
    return {**found, "kind": kind, "parts": parts, "axis": axis}


def _piece(entry: Mapping[str, Any], views: Sequence[Tensor]) -> Piece:
    first, *more = (views[number] for number in entry["parts"])
    part: SharedFactors | PointFactors | Tensor = first
    if entry["kind"] == "shared":
        part = SharedFactors(own=first, shared=more[0], axis=entry["axis"])
    elif entry["kind"] == "point":
        part = PointFactors(own=first, shared=more[0], axis=entry["axis"])
    rows = views[entry["rows"]]
    return Piece(name=entry["name"], use=entry["use"], rows=rows, part=part, sequence=entry["sequence"])


def _placed(tensor: Tensor, stride: Sequence[int], offset: int, device: torch.device) -> Tensor:
    """A copy with these strides, whose memory begins as far past a multiple of the alignment as it did."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    room = torch.empty(max(extent, 0) + ALIGNMENT // tensor.element_size(), dtype=tensor.dtype, device=device)
    begin = (offset - room.data_ptr()) % ALIGNMENT // tensor.element_size()
    placed = room.as_strided(tensor.shape, stride, begin)
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)  # what is broadcast is one place
    placed[once].copy_(tensor[once])
    return placed
