"""Random powers of two with signs: to multiply by one is exact in floating point, and undone to the last bit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 2**14 - 1
"""What is drawn anew in each quarter of a random number below 2^62."""


def random_powers(shape: Sequence[int], exponents: range, generator: torch.Generator) -> Tensor:
    """±2^k, k drawn from the exponents: two entries are equal with a probability of about 1 / (2 len(exponents)).

    Args:
        shape: Of the result, in float32 on the CPU.
        exponents: Without gaps.
        generator: What is drawn from.
    """
    count = math.prod(shape)
    drawn = torch.randint(2**62, (-(-count // 4),), generator=generator)  # drawing is slow: each gives four numbers
    values = torch.tensor([sign * 2.0**k for k in exponents for sign in (1, -1)])
    return values[(drawn.view(torch.int16)[:count] & BITS).long() % len(values)].reshape(tuple(shape))
