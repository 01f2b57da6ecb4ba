"""What `vmap` maps over has no one value that could be looked at: who looks at values asks here first."""

from collections.abc import Iterable

import torch
from torch import Tensor


def is_mapped(tensor: Tensor) -> bool:
    """Say whether `vmap` maps over a tensor; under `jacrev` and `grad` alone its value is there."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_not_mapped(what: str, tensors: Iterable[Tensor], *, instead: str) -> None:
    """Raise where `vmap` maps over one of the tensors.

    Args:
        what: What looks at their values.
        tensors: The tensors.
        instead: What to do.

    Raises:
        RuntimeError: If so.
    """
    if any(map(is_mapped, tensors)):
        raise RuntimeError(f"{what} looks at values, which there are none of under torch.func.vmap; {instead}")


def check_not_transformed(what: str, *, instead: str) -> None:
    """Raise inside a transform of `torch.func` (vmap, grad, jacrev …), whatever it maps or differentiates.

    Args:
        what: What differentiates by itself.
        instead: What to do.

    Raises:
        RuntimeError: If so.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{what} differentiates by itself, and not inside a transform of torch.func; {instead}")
