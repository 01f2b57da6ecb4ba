"""The rate of plain matrix products on this machine, in operations a second."""

from time import perf_counter

import torch

DTYPES = ("float32", "bfloat16", "float64")


def gemm_rates(*, size: int = 2048, seconds: float = 0.5) -> dict[str, float]:
    """The best of repeated products of square matrices, by dtype.

    Args:
        size: Of the matrices.
        seconds: How long each dtype repeats, at least twice.
    """
    return {name: gemm_rate(getattr(torch, name), size=size, seconds=seconds) for name in DTYPES}


def gemm_rate(dtype: torch.dtype, *, size: int, seconds: float) -> float:
    """The best of repeated products in one dtype; the first, which may compile or allocate, does not count."""
    left = torch.randn(size, size).to(dtype)
    right = torch.randn(size, size).to(dtype)
    out = torch.mm(left, right)
    best, spent, count = float("inf"), 0.0, 0
    while spent < seconds or count < 2:
        begin = perf_counter()
        torch.mm(left, right, out=out)
        taken = perf_counter() - begin
        best, spent, count = min(best, taken), spent + taken, count + 1
    return 2 * size**3 / best
