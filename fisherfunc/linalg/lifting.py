"""Lifting: from the eigenvalues of K = G Gᵀ, as a solver gives them, to the `Spectrum` of F = (1/N) Gᵀ G.

λ(F) = λ(K)/N: the one division by N of the package. Round-off below zero is set to zero and reported. What is told
from zero, with eps that of the dtype of G, eps' that of the sums over P and of the solver:

    of a Gram           (n eps + √P eps') ‖K‖/N, or what was measured of its error in place of n eps ‖K‖ (`solved`)
    of rows as given    (n eps' + √P eps') ‖K‖/N, of singular values (n eps' + √P eps')² ‖K‖/N; plus eps² tr K/N

Axis order: a Gram is `(n, n)`, a gradient matrix `(n, p)`; leading axes are stacks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.gram import Gram, as_gram
from fisherfunc.linalg.spectrum import Spectrum

Dtype = torch.dtype
Eigenvalues = Callable[[Tensor], Tensor]
"""The matrix of a Gram, or a gradient matrix → the eigenvalues of K in any order, round-off and all."""


@runtime_checkable
class GramKernel(Protocol):
    """Gram → Spectrum."""

    def __call__(self, gram: Gram) -> Spectrum:
        """Solve.

        Args:
            gram: K, the N to divide by, and what sets the resolution. Kernels of this package also take a plain matrix,
                with the other fields of a `Gram` as keyword arguments.
        """


@runtime_checkable
class RowKernel(Protocol):
    """G → Spectrum."""

    def __call__(
        self,
        rows: Float[Tensor, "*stack n p"],
        *,
        num_units: int | None = None,
        num_tokens: int | None = None,
        precision: Dtype | None = None,
        scale: Float[Tensor, "*stack"] | None = None,
    ) -> Spectrum:
        """Solve.

        Args:
            rows: The gradient matrix G.
            num_units: N, to divide by; the number of rows where None.
            num_tokens: The same, by the name that it had before.
            precision: The dtype that the entries of G were rounded to; that of G where None.
            scale: The norm of K = G Gᵀ before a cancellation (centring), where round-off entered.
        """


@dataclass(frozen=True, kw_only=True)
class After:
    """The kernel that solves another Gram: `inner` after `change`. A spectrum is held against the Gram that it is of.

    Attributes:
        change: Gram → Gram.
        inner: Gram → spectrum.
    """

    change: Callable[[Gram], Gram]
    inner: GramKernel

    def __call__(self, gram: Gram | Tensor, **context: Any) -> Spectrum:
        """Solve."""
        return self.named(self.inner(self.change(as_gram(gram, **context))))

    def named(self, found: Spectrum) -> Spectrum:
        """The spectrum, with a solver that says what was solved."""
        return replace(found, solver=f"{found.solver} after {getattr(self.change, '__name__', 'a change')}")


def gram_kernel(eigenvalues: Eigenvalues, *, solver: str, exact: bool = True) -> GramKernel:
    """The kernel of a method that takes K.

    Args:
        eigenvalues: The method; its eigenvalues are of K, in any order.
        solver: What results call it.
        exact: False for an approximation, which may have fewer eigenvalues.

    Example:
        >>> ascending = gram_kernel(torch.linalg.eigvalsh, solver="eigvalsh")
        >>> ascending(Gram(matrix=torch.tensor([[2.0, 0.0], [0.0, 6.0]]), num_units=2)).eigenvalues
        tensor([3., 1.])
    """

    def kernel(gram: Gram | Tensor, **context: Any) -> Spectrum:
        gram = as_gram(gram, **context)
        matrix, num_rows = gram.matrix, gram.matrix.shape[-1]
        values = _descending(eigenvalues(matrix), matrix, at_most=num_rows, solver=solver)
        size = (num_rows, gram.num_params)
        floor = relative_floor(size, rows_in=gram.rows_in, sums_in=(matrix.dtype, values.dtype))
        return replace(_spectrum(values, size, floor * _norm(values, gram.scale), gram.num_units, solver), exact=exact)

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

    def kernel(rows, *, num_units=None, num_tokens=None, precision=None, scale=None):
        values = _descending(eigenvalues(rows), rows, at_most=max(rows.shape[-2:]), solver=solver)
        size = (rows.shape[-2], rows.shape[-1])
        floor = relative_floor(size, rows_in=values.dtype, sums_in=(values.dtype,)) ** (2 if by_singular_values else 1)
        rounding = rounding_floor(rows, precision=precision, scale=scale).to(values)
        count = rows.shape[-2] if num_units is None and num_tokens is None else num_units or num_tokens
        found = _spectrum(values, size, floor * _norm(values, scale) + rounding, count, solver)
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


def solved(kernel: GramKernel, gram: Gram) -> Spectrum:
    """The spectrum of a Gram, whose resolution is what was measured of its error where it was.

    An eigenvalue of K below zero shows its error as well.

    Args:
        kernel: Gram → spectrum.
        gram: K.
    """
    if isinstance(kernel, After):
        return kernel.named(solved(kernel.inner, kernel.change(gram)))
    found = kernel(gram)
    if gram.error is None:
        return found
    size = (gram.matrix.shape[-1], found.num_params)
    floor = relative_floor(size, rows_in=gram.matrix.dtype, sums_in=(gram.matrix.dtype, found.eigenvalues.dtype))
    solver = floor * _norm(found.eigenvalues * found.num_units, gram.scale) / found.num_units
    error = gram.error.to(solver) / found.num_units
    return replace(found, resolution=torch.maximum(solver + error, -found.negative_part))


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


def _spectrum(values, size, floor, num_units, solver) -> Spectrum:
    num_rows, num_params = size
    rank_bound = num_rows if num_params is None else min(num_rows, num_params)
    return Spectrum(
        eigenvalues=values[..., :rank_bound].clamp(min=0) / num_units,
        resolution=floor / num_units,
        negative_part=values[..., -1].clamp(max=0) / num_units,
        num_units=num_units,
        num_params=num_params,
        solver=solver,
    )
