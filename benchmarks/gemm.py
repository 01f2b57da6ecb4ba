"""The rate of plain matrix products on this machine, in operations a second."""

import torch

from fisherfunc.runtime.clock import clock

DTYPES = ("float32", "bfloat16", "float64")


def gemm_rates(*, size: int = 2048, seconds: float = 0.5, device: str = "cpu") -> dict[str, float]:
    """The best of repeated products of square matrices, by dtype.

    Args:
        size: Of the matrices.
        seconds: How long each dtype repeats, at least twice.
        device: Where.
    """
    return {name: gemm_rate(getattr(torch, name), size=size, seconds=seconds, device=device) for name in DTYPES}


def gemm_rate(dtype: torch.dtype, *, size: int, seconds: float, device: str = "cpu") -> float:
    """The best of repeated products in one dtype; the first, which may compile or allocate, does not count."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.mm(left, right)
    best, spent, count = float("inf"), 0.0, 0
    while spent < seconds or count < 2:
        begin = clock(left.device)
        torch.mm(left, right, out=out)
        taken = clock(left.device) - begin
        best, spent, count = min(best, taken), spent + taken, count + 1
    return 2 * size**3 / best
