"""Random powers of two with signs: to multiply by one is exact in floating point, and undone to the last bit."""

from collections.abc import Sequence

import torch
from torch import Tensor


def random_powers(shape: Sequence[int], exponents: range, generator: torch.Generator) -> Tensor:
    """±2^k, k drawn from the exponents: two entries are equal with probability 1 / (2 len(exponents)).

    Args:
        shape: Of the result, in float32 on the CPU.
        exponents: Without gaps.
        generator: What is drawn from.
    """
    powers = torch.randint(exponents.start, exponents.stop, tuple(shape), generator=generator)
    signs = 1 - 2 * torch.randint(2, tuple(shape), generator=generator)
    return signs * 2.0**powers
