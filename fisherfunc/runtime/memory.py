"""How much memory is free, and how much a forward pass keeps for the backward pass."""

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def free_bytes(device: torch.device) -> int:
    """The memory that is free on a device, in bytes, with what torch keeps of it for tensors to come."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil  # here, where it is asked for

    return int(psutil.virtual_memory().available)


def give_back() -> None:
    """Have the C library return to the system what it keeps of freed memory, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class SavedBytes(TorchDispatchMode):
    """What forward passes inside the context save for their backward passes, in bytes.

    Counted is the memory that operations inside made and that is still held at the end of the context: what a graph
    that is alive then saves, and what leads to it. Tensors that were there before, such as parameters, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and note the memory that it made."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                    storage = leaf.untyped_storage()
                    self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def __exit__(self, *error: Any) -> None:
        """Count what is still there."""
        super().__exit__(*error)
        self._sizes = [size for there, size in self._made.values() if not there.expired()]
        self._made.clear()

    @property
    def total(self) -> int:
        """All memory together."""
        return sum(self._sizes)

    @property
    def largest(self) -> int:
        """The largest piece of memory."""
        return max(self._sizes, default=0)
