"""Several tensors as the bytes of one, to be sent at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes that the start of a tensor among others is a multiple of: no dtype is wider."""


class Room:
    """Memory for what goes and what comes, kept for the next time: the pages of new memory take longer than a copy."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def bytes(self, name: str, size: int, like: Tensor) -> Tensor:
        """Return so many bytes on the device of `like`: those of the same name as before where they are enough."""
        found = self._kept.pop(name, None)
        if found is None or len(found) < size or found.device != like.device:
            del found  # gone before others are made
            found = torch.empty(size, dtype=torch.uint8, device=like.device)
        self._kept[name] = found
        return found[:size]


def flat(tensors: Sequence[Tensor], like: Tensor, room: Room) -> Tensor:
    """Return the bytes of tensors, one after the other."""
    found = room.bytes("sent", sum(_aligned(num_bytes(t)) for t in tensors), like)
    start = 0
    for tensor in tensors:
        found[start : start + num_bytes(tensor)].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += _aligned(num_bytes(tensor))
    return found


def parted(flat: Tensor, shapes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Return tensors that are views of their bytes."""
    found, start = [], 0
    for dtype, shape in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(flat[start : start + size].view(dtype).view(shape))
        start += _aligned(size)
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()
