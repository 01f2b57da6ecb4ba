"""Calls of torch functions in a forward pass, by names that another pass over other sequences has too."""

from dataclasses import dataclass

from torch import Tensor

Call = tuple[str, int, int]
"""A call of a torch function that returns one tensor in the graph: the last use before it, a parameter and which use of
it, and how many calls after that. Other calls may come and go with the length of a sequence or its mask."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor that a torch function made.

    Attributes:
        call: Which call it was.
        number: How many calls there were up to it.
        shape: Of the tensor.
        kind: Of its entries, and where they are.
        num_bytes: Of its entries.
    """

    call: Call
    number: int
    shape: tuple[int, ...]
    kind: str
    num_bytes: int


def made_by(call: Call, number: int, result: Tensor) -> Made:
    """What a call made."""
    size = result.numel() * result.element_size()
    return Made(call=call, number=number, shape=tuple(result.shape), kind=kind_of(result), num_bytes=size)


def kind_of(tensor: Tensor) -> str:
    """What a tensor's entries are, and where, in words.

    Example:
        >>> import torch
        >>> kind_of(torch.ones(1))
        'torch.float32 on cpu'
    """
    return f"{tensor.dtype} on {tensor.device}"
