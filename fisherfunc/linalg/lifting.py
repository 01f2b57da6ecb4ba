"""Lifting: from the eigenvalues of K = G Gᵀ, as a solver gives them, to the `Spectrum` of F = (1/N) Gᵀ G.

λ(F) = λ(K)/N: the one division by N of the package. Round-off below zero is set to zero and reported. What is told
from zero, with eps that of the dtype of G, eps' that of the sums over P and of the solver:

    of a Gram           (n eps + √P eps') ‖K‖/N, or what was measured of its error in place of n eps ‖K‖ (`solved`)
    of rows as given    (n eps' + √P eps') ‖K‖/N, of singular values (n eps' + √P eps')² ‖K‖/N; plus eps² tr K/N

Axis order: a Gram is `(n, n)`, a gradient matrix `(n, p)`; leading axes are stacks.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.linalg.token_grams import TokenGrams

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
            precision: The dtype that the entries of G were rounded to; that of G where None.
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
        floor = relative_floor(size, rows_in=precision or gram.dtype, sums_in=(gram.dtype, values.dtype))
        return replace(_spectrum(values, size, floor * _norm(values, scale), num_tokens, solver), exact=exact)

    return kernel


def row_kernel(
    eigenvalues: Eigenvalues, *, solver: str, exact: bool = True, by_singular_values: bool = False
) -> RowKernel:
    """The kernel of a method that takes G.

    Args:
        eigenvalues: The method; its eigenvalues are of G Gᵀ, in any order.
        solver: What results call it.
        exact: False for an approximation.
        by_singular_values: Whether they are squares of singular values of G, which are right to eps' of the largest.
    """

    def kernel(rows, *, num_tokens=None, precision=None, scale=None):
        values = _descending(eigenvalues(rows), rows, at_most=max(rows.shape[-2:]), solver=solver)
        size = (rows.shape[-2], rows.shape[-1])
        floor = relative_floor(size, rows_in=values.dtype, sums_in=(values.dtype,)) ** (2 if by_singular_values else 1)
        rounding = rounding_floor(rows, precision=precision, scale=scale).to(values)
        found = _spectrum(values, size, floor * _norm(values, scale) + rounding, num_tokens, solver)
        return replace(found, exact=exact)

    return kernel


def rounding_floor(
    rows: Float[Tensor, "*stack n p"], *, precision: Dtype | None = None, scale: Float[Tensor, "*stack"] | None = None
) -> Float[Tensor, "*stack"]:
    """eps² tr K: the largest eigenvalue of K that rounding the entries of G can make of zero, and four times that.

    An entry is off by eps/2 of itself, so that no singular value is off by more than eps/2 ‖G‖_F (Weyl).

    Args:
        rows: G.
        precision: The dtype that its entries were rounded to; their own where None.
        scale: The norm of K before a cancellation, where they were rounded: then tr K was at most √n of it.
    """
    trace = rows.double().square().sum(dim=(-2, -1))
    trace = trace if scale is None else torch.maximum(trace, rows.shape[-2] ** 0.5 * scale.to(trace))
    return torch.finfo(precision or rows.dtype).eps ** 2 * trace


def solved(kernel: GramKernel, grams: TokenGrams, names: Iterable[str] | None = None) -> Spectrum:
    """The spectrum of a block, whose resolution is what was measured of its Gram where it was.

    Args:
        kernel: Gram → spectrum.
        grams: The Grams of a pass.
        names: Those that make up the block; all where None.
    """
    names = list(grams.grams if names is None else names)
    gram, scale = grams.block(names), grams.block_scale(names)
    found = kernel(
        gram,
        num_tokens=grams.num_units,
        num_params=sum(grams.num_params[name] for name in names),
        precision=grams.precision,
        scale=scale,
    )
    return with_error(found, gram, grams.block_error(names), scale)


def with_error(found: Spectrum, gram: Float[Tensor, "n n"], error: float | None, scale: Tensor | None) -> Spectrum:
    """The spectrum of a Gram whose error was measured; as it was where that is None.

    An eigenvalue of K below zero shows its error as well.

    Args:
        found: The spectrum.
        gram: K.
        error: Of K, in the spectral norm.
        scale: The norm of K before a cancellation.
    """
    if error is None:
        return found
    size = (gram.shape[-1], found.num_params)
    floor = relative_floor(size, rows_in=gram.dtype, sums_in=(gram.dtype, found.eigenvalues.dtype))
    solver = floor * _norm(found.eigenvalues * found.num_tokens, scale) / found.num_tokens
    return replace(found, resolution=torch.maximum(solver + error / found.num_tokens, -found.negative_part))


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


def relative_floor(size, *, rows_in: Dtype, sums_in: tuple[Dtype, ...]) -> float:
    """(n eps + √P eps'), of ‖K‖: what sums of products of coarse rows are off by."""
    num_rows, num_params = size
    sum_eps = max(torch.finfo(dtype).eps for dtype in sums_in)
    # Round-off in a sum of P products grows like a random walk: five parallel float64 rows of a million
    # entries gave an eigenvalue of 80 eps ‖K‖ that should be zero, where n · eps allows 5.
    return num_rows * max(torch.finfo(rows_in).eps, sum_eps) + math.sqrt(num_params or 0) * sum_eps


def _norm(values: Tensor, scale: Tensor | None) -> Tensor:
    norm = values[..., 0].clamp(min=0)
    return norm if scale is None else torch.maximum(norm, scale.to(values))


def _spectrum(values, size, floor, num_tokens, solver) -> Spectrum:
    num_rows, num_params = size
    num_tokens = num_rows if num_tokens is None else num_tokens
    rank_bound = num_rows if num_params is None else min(num_rows, num_params)
    return Spectrum(
        eigenvalues=values[..., :rank_bound].clamp(min=0) / num_tokens,
        resolution=floor / num_tokens,
        negative_part=values[..., -1].clamp(max=0) / num_tokens,
        num_tokens=num_tokens,
        num_params=num_params,
        solver=solver,
    )
