"""Lifting: from the eigenvalues of K = G Gᵀ, as a solver gives them, to the `Spectrum` of F = (1/N) Gᵀ G.

λ(F) = λ(K)/N: the one division by N of the package. Round-off below zero is set to zero and reported; the
floor under which eigenvalues mean nothing is (n · eps + √P · eps') · ‖K‖/N, with eps that of the dtype of G
and eps' that of the sums over P. Axis order: a Gram is `(n, n)`, a gradient matrix `(n, p)`; leading axes are
stacks.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.spectrum import Spectrum

Dtype = torch.dtype
Eigenvalues = Callable[[Tensor], Tensor]
"""A Gram, or a gradient matrix → the eigenvalues of K in any order, round-off and all."""


@runtime_checkable
class GramKernel(Protocol):
    """K → Spectrum."""

    def __call__(
        self,
        gram: Float[Tensor, "*stack n n"],
        *,
        num_tokens: int | None = None,
        num_params: int | None = None,
        precision: Dtype | None = None,
        scale: Float[Tensor, "*stack"] | None = None,
    ) -> Spectrum:
        """Solve.

        Args:
            gram: The unnormalised Gram K = G Gᵀ.
            num_tokens: N, to divide by; the size of the Gram where None.
            num_params: P; where given, only the min(N, P) eigenvalues that can be nonzero are kept.
            precision: The dtype in which G was computed; that of the Gram where None. It sets the resolution.
            scale: The norm of K before a cancellation (centring, summing), where round-off entered.
        """


@runtime_checkable
class RowKernel(Protocol):
    """G → Spectrum."""

    def __call__(
        self,
        rows: Float[Tensor, "*stack n p"],
        *,
        num_tokens: int | None = None,
        precision: Dtype | None = None,
        scale: Float[Tensor, "*stack"] | None = None,
    ) -> Spectrum:
        """Solve.

        Args:
            rows: The gradient matrix G.
            num_tokens: N, to divide by; the number of rows where None.
            precision: The dtype in which G was computed; that of G where None.
            scale: The norm of K = G Gᵀ before a cancellation (centring), where round-off entered.
        """


def gram_kernel(eigenvalues: Eigenvalues, *, solver: str, exact: bool = True) -> GramKernel:
    """The kernel of a method that takes K.

    Args:
        eigenvalues: The method; its eigenvalues are of K, in any order.
        solver: What results call it.
        exact: False for an approximation, which may have fewer eigenvalues.

    Example:
        >>> ascending = gram_kernel(torch.linalg.eigvalsh, solver="eigvalsh")
        >>> ascending(torch.tensor([[2.0, 0.0], [0.0, 6.0]])).eigenvalues
        tensor([3., 1.])
    """

    def kernel(gram, *, num_tokens=None, num_params=None, precision=None, scale=None):
        if gram.shape[-1] != gram.shape[-2]:
            raise ValueError(
                f"{solver} expected a square Gram (n, n), got a matrix of shape {tuple(gram.shape)}; a gradient matrix "
                "goes into kernels.of_rows(kernel), or into a kernel of rows such as kernels.svd()"
            )
        values = _descending(eigenvalues(gram), gram, at_most=gram.shape[-1], solver=solver)
        size = (gram.shape[-1], num_params)
        floor = _relative_floor(size, rows_in=precision or gram.dtype, sums_in=(gram.dtype, values.dtype))
        return replace(_spectrum(values, size, floor, num_tokens, scale, solver), exact=exact)

    return kernel


def row_kernel(eigenvalues: Eigenvalues, *, solver: str, exact: bool = True) -> RowKernel:
    """The kernel of a method that takes G.

    Args:
        eigenvalues: The method; its eigenvalues are of G Gᵀ, in any order.
        solver: What results call it.
        exact: False for an approximation.
    """

    def kernel(rows, *, num_tokens=None, precision=None, scale=None):
        values = _descending(eigenvalues(rows), rows, at_most=max(rows.shape[-2:]), solver=solver)
        size = (rows.shape[-2], rows.shape[-1])
        floor = _relative_floor(size, rows_in=precision or rows.dtype, sums_in=(values.dtype,))
        return replace(_spectrum(values, size, floor, num_tokens, scale, solver), exact=exact)

    return kernel


def _descending(values, matrix: Tensor, *, at_most: int, solver: str) -> Tensor:
    """What a method returned, largest first. Its values are looked at elsewhere: here it may be mapped by `vmap`."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"the eigenvalues of {solver!r} expected a tensor, got {type(values).__name__}; return the eigenvalues "
            "alone (torch.linalg.eigvalsh, or the first of torch.linalg.eigh)"
        )
    if not values.is_floating_point():
        raise TypeError(
            f"the eigenvalues of {solver!r} expected a real floating-point dtype, got {values.dtype}; a Gram is "
            "symmetric: use torch.linalg.eigvalsh"
        )
    stack = matrix.shape[:-2]
    if values.ndim != len(stack) + 1 or values.shape[:-1] != stack or not 1 <= values.shape[-1] <= at_most:
        expected = (*stack, f"1 to {at_most}")
        raise ValueError(
            f"the eigenvalues of {solver!r} expected the shape {expected} for a matrix of shape {tuple(matrix.shape)}, "
            f"got {tuple(values.shape)}"
        )
    return values.to(matrix.device).sort(dim=-1, descending=True).values


def _relative_floor(size, *, rows_in: Dtype, sums_in: tuple[Dtype, ...]) -> float:
    num_rows, num_params = size
    sum_eps = max(torch.finfo(dtype).eps for dtype in sums_in)
    # Round-off in a sum of P products grows like a random walk: five parallel float64 rows of a million
    # entries gave an eigenvalue of 80 eps ‖K‖ that should be zero, where n · eps allows 5.
    return num_rows * max(torch.finfo(rows_in).eps, sum_eps) + math.sqrt(num_params or 0) * sum_eps


def _spectrum(values, size, relative_floor, num_tokens, scale, solver) -> Spectrum:
    num_rows, num_params = size
    num_tokens = num_rows if num_tokens is None else num_tokens
    rank_bound = num_rows if num_params is None else min(num_rows, num_params)
    norm = values[..., 0].clamp(min=0)
    norm = norm if scale is None else torch.maximum(norm, scale.to(values))
    return Spectrum(
        eigenvalues=values[..., :rank_bound].clamp(min=0) / num_tokens,
        resolution=relative_floor * norm / num_tokens,
        negative_part=values[..., -1].clamp(max=0) / num_tokens,
        num_tokens=num_tokens,
        num_params=num_params,
        solver=solver,
    )
