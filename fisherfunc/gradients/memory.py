"""How much memory is free, and how much a forward pass keeps for the backward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import psutil
import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int:
    """The memory that is free on a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def saved_bytes(forward: Callable[[], Any], *, beside: Iterable[Tensor] = ()) -> tuple[int, int]:
    """What `forward` saves for its backward pass: all tensors together, and the largest one, in bytes.

    Args:
        forward: Runs with gradients enabled; its result is thrown away.
        beside: Tensors that are there anyway, such as the parameters; what shares their memory does not count.
    """
    sizes: dict[int, int] = {}
    there = {tensor.untyped_storage().data_ptr() for tensor in beside}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() not in there:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values()), max(sizes.values(), default=0)
