"""How much memory is free, and how much a forward pass keeps for the backward pass."""

import ctypes
import sys
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """The memory that is free on a device, in bytes, with what torch keeps of it for tensors to come."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(psutil.virtual_memory().available)


def give_back() -> None:
    """Have the C library return to the system what it keeps of freed memory, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class SavedBytes:
    """What forward passes inside the context save for their backward passes, in bytes.

    Args:
        beside: Tensors that are there anyway, such as the parameters; what shares their memory does not count.
    """

    def __init__(self, *, beside: Iterable[Tensor] = ()) -> None:
        self._sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # or the memory of one that is let go would be counted for the next one too
        there = {tensor.untyped_storage().data_ptr() for tensor in beside}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in there:
                self._alive.append(tensor.detach())
                self._sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor.detach()  # what a graph has made leads back to it: it would hold itself, for good

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.detach)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._alive.clear()

    @property
    def total(self) -> int:
        """All tensors together, each counted once."""
        return sum(self._sizes.values())

    @property
    def largest(self) -> int:
        """The largest tensor."""
        return max(self._sizes.values(), default=0)
