"""Random powers of two with signs: to multiply by one is exact in floating point, and undone to the last bit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 14
"""Drawn anew in each quarter of a random number below 2^62."""
BIAS = 127
"""Of the exponent in the bits of a number in float32; the sign comes before it, 23 digits after it."""


def random_powers(shape: Sequence[int], exponents: range, generator: torch.Generator) -> Tensor:
    """±2^k, k drawn from the exponents: two entries are equal with a probability of about 1 / (2 len(exponents)).

    Args:
        shape: Of the result, in float32 on the CPU.
        exponents: Without gaps.
        generator: What is drawn from.
    """
    count = math.prod(shape)
    # Drawing is slow: each gives four numbers.
    drawn = torch.randint(2**62, (-(-count // 4),), generator=generator, device="cpu")
    number = drawn.view(torch.int16)[:count].int().bitwise_and_(2**BITS - 1)
    number = number.mul_(2 * len(exponents)).bitwise_right_shift_(BITS)  # from 0 to 2 len(exponents) - 1
    sign = number << 31
    power = number.bitwise_right_shift_(1).add_(BIAS + exponents.start).bitwise_left_shift_(23)
    return power.bitwise_or_(sign).view(torch.float32).reshape(tuple(shape))
