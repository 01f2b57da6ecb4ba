"""Several tensors as the bytes of one, to be sent at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes that the start of a tensor among others is a multiple of: no dtype is wider."""


def flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the bytes of tensors, one after the other."""
    found = torch.empty(sum(_room(num_bytes(t)) for t in tensors), dtype=torch.uint8, device=like.device)
    start = 0
    for tensor in tensors:
        found[start : start + num_bytes(tensor)].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += _room(num_bytes(tensor))
    return found


def parted(flat: Tensor, shapes: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Return tensors that are views of their bytes."""
    found, start = [], 0
    for dtype, shape in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(flat[start : start + size].view(dtype).view(shape))
        start += _room(size)
    return found


def _room(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()
