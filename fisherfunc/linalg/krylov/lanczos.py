"""Leading eigenvalues of F = (1/N) Gᵀ G by Lanczos in the space of its rows, with a certificate of each.

A Ritz pair (θ, y), y of norm 1, of the symmetric A = K/N has the residual r = ‖A y − θ y‖: an eigenvalue of A lies
within r of θ (Parlett, "The symmetric eigenvalue problem", section 4.5), and the k-th largest eigenvalue is no smaller
than the k-th largest θ (Courant and Fischer). Both hold for the exact product; the round-off of the computed one is
measured, and added. Axis order: eigenpairs `k`, rows `n`.
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.krylov.krylov import Keep, Krylov, Step, grow, measured_round_off, random_vectors
from fisherfunc.linalg.krylov.token_operator import TokenOperator
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.records.axes import Progress
from fisherfunc.records.record import record


@record(static=("num_units", "num_params", "solver", "fallback", "exact", "num_steps", "num_products", "complete"))
class LeadingEigenvalues(Spectrum):
    """The leading eigenvalues of F, approximate and certified; all others are left out.

    Attributes:
        eigenvalues: θ_k, in descending order; the k-th largest eigenvalue of F is no smaller than θ_k less `round_off`.
        resolution: The round-off, below which eigenvalues are not told from zero.
        negative_part: The most negative θ_k before it was set to zero.
        num_units: N, what the Gram is divided by.
        num_params: P, or None.
        solver: The method and its options.
        fallback: Why the number of steps was not enough, or None.
        exact: False.
        residuals: ‖A y − θ y‖ of the computed products.
        bounds: `residuals` and `round_off` together: an eigenvalue of F lies within each of them.
        round_off: How far a product of one of the vectors is from that of exact arithmetic, as measured, and
            how far the operator says that its matrix is from the exact one.
        missed: No eigenvalue that these do not account for is larger, from the trace or the Frobenius norm of F; NaN
            where neither is known, so that nothing is certified of what may have been missed.
        complete: Whether `missed` shows that these are the largest eigenvalues; None where it is not known.
        num_steps: The dimension of the space that they are from.
        num_products: How many products with F were taken, the one that measures the round-off included.
        vectors: y_k, `(k, n)`, orthonormal over the rows of G; None where not asked for. Gᵀy/√(θN) is the eigenvector
            in parameter space.
    """

    residuals: Float[Tensor, " k"]
    bounds: Float[Tensor, " k"]
    round_off: Float[Tensor, ""]
    missed: Float[Tensor, ""]
    complete: bool | None
    num_steps: int
    num_products: int
    vectors: Float[Tensor, "k n"] | None = None


LanczosKernel = Callable[..., LeadingEigenvalues]


def lanczos(
    *,
    num_leading: int = 20,
    tolerance: float = 1e-2,
    num_steps: int | None = None,
    seed: int = 0,
    vectors: bool = False,
    width: int = 1,
) -> LanczosKernel:
    """Return operator → its leading eigenvalues, by Lanczos in token space in float64, fully orthogonalised.

    It stops when all wanted residuals are at most `tolerance` times their eigenvalues, or at the round-off of the
    products. Cost: a product a step and one more; memory 8 N a step. The kernel takes an operator (of
    `ff.operators.fisher`, `gram_operator` or a stored Gram), and as keywords `steps`, those of an earlier call to go on
    from, `keep`, called with each new step, and `progress`, called with the products done and the most there will be.

    Args:
        num_leading: How many eigenvalues; fewer where F has fewer that can be other than zero.
        tolerance: Of the residuals, relative to their eigenvalues.
        num_steps: The most products; 5 `num_leading` + 20 `width` where None. Where they are not enough, the result
            has what they gave, with residuals as they are, and says so in `fallback`.
        seed: Of the first vectors.
        vectors: Whether to return the eigenvectors over the rows.
        width: How many vectors are multiplied together. With 8 it takes twice the products, and a quarter of the reads
            of a stored Gram; and eigenvalues that occur up to so many times are all found.

    Raises:
        ValueError: If an option is out of range, or, of the kernel, a product is not finite.

    Example:
        >>> from fisherfunc.linalg.krylov.token_operator import gram_operator
        >>> found = lanczos(num_leading=2, tolerance=1e-9)(gram_operator(torch.diag(torch.tensor([9.0, 6.0, 3.0]))))
        >>> found.eigenvalues, bool((found.bounds < 1e-9).all()), found.complete
        (tensor([3., 2.], dtype=torch.float64), True, True)
    """
    if num_leading < 1:
        raise ValueError(f"lanczos expected num_leading >= 1, got num_leading={num_leading}")
    if not tolerance > 0:
        raise ValueError(f"lanczos expected tolerance > 0, got tolerance={tolerance!r}; 1e-2 is one per cent")
    if width < 1:
        raise ValueError(f"lanczos expected width >= 1, got width={width}; 1 multiplies one vector at a time")
    most = 5 * num_leading + 20 * width if num_steps is None else num_steps
    if most < num_leading:
        raise ValueError(f"lanczos expected num_steps >= num_leading, got num_steps={most}, num_leading={num_leading}")
    wide = f", width={width}" if width > 1 else ""
    solver = f"lanczos(num_leading={num_leading}, tolerance={tolerance:g}, num_steps={most}, seed={seed}{wide})"

    def kernel(
        operator: TokenOperator,
        *,
        steps: Iterable[Step] = (),
        keep: Keep | None = None,
        progress: Progress | None = None,
    ) -> LeadingEigenvalues:
        wanted = min(num_leading, operator.num_rows, operator.num_params or operator.num_rows)
        capacity = min(most, operator.num_rows)
        start = random_vectors(min(width, operator.num_rows), operator.num_rows, seed).to(operator.device)
        space = Krylov(start, capacity, seed)
        made = list(steps)[:capacity]
        parted = len(made) % len(start) if len(made) < capacity else 0  # of a product that was not taken to its end
        for step in made[: len(made) - parted]:
            space.add(step)
        while True:
            if space.num_steps:
                if progress is not None:
                    progress(space.num_steps, capacity + 1)
                values, within, residuals = _ritz(space)
                if space.full or (
                    space.num_steps >= wanted and _done(space, values[:wanted], residuals[:wanted], tolerance)
                ):
                    break
            grow(operator, {0: space}, None if keep is None else lambda _, step: keep(step))
        return _certified(operator, space, values[:wanted], within[:, :wanted], residuals[:wanted])

    def _certified(
        operator: TokenOperator, space: Krylov, values: Tensor, within: Tensor, residuals: Tensor
    ) -> LeadingEigenvalues:
        error, measured = measured_round_off(operator, space, within)
        round_off = torch.tensor(error + operator.inexact, dtype=torch.float64, device="cpu")
        bounds = residuals + round_off
        missed = _missed(operator, values, bounds)
        short = int((residuals > tolerance * values.clamp(min=0) + round_off).sum())
        least = float(values[-1] - bounds[-1])
        rows = (within.mT.to(space.basis) @ space.basis) if vectors else None
        return LeadingEigenvalues(
            eigenvalues=values.clamp(min=0),
            resolution=round_off,
            negative_part=values[-1].clamp(max=0),
            num_units=operator.num_tokens,
            num_params=operator.num_params,
            solver=solver,
            fallback=f"{short} residuals are above the tolerance after {space.num_steps} steps" if short else None,
            exact=False,
            residuals=residuals,
            bounds=bounds,
            round_off=round_off,
            missed=missed,
            complete=None if bool(missed.isnan()) else float(missed) < least or space.num_steps == operator.num_rows,
            num_steps=space.num_steps,
            num_products=space.num_steps + measured,
            vectors=rows,
        )

    return kernel


def _ritz(space: Krylov) -> tuple[Tensor, Tensor, Tensor]:
    """θ in descending order, the coefficients of y in the basis `(m, k)`, and ‖Ã y − θ y‖, all on the CPU."""
    inside, outside = space.coefficients.split([space.num_steps, len(space.coefficients) - space.num_steps])
    symmetric = (inside + inside.mT) / 2
    values, vectors = torch.linalg.eigh(symmetric)
    values, vectors = values.flip(0), vectors.flip(1)
    off = torch.linalg.vector_norm((inside - symmetric) @ vectors, dim=0)
    return values, vectors, torch.hypot(off, torch.linalg.vector_norm(outside @ vectors, dim=0))


def _done(space: Krylov, values: Tensor, residuals: Tensor, tolerance: float) -> bool:
    """Whether all residuals are small, or no smaller than what H lacks of symmetry lets them be."""
    inside = space.coefficients[: space.num_steps]
    lacking = float(torch.linalg.matrix_norm(inside - inside.mT)) / max(len(inside), 1) ** 0.5
    floor = max(lacking, space.round_off)
    return bool((residuals <= tolerance * values.clamp(min=0) + floor).all())


def _missed(operator: TokenOperator, values: Tensor, bounds: Tensor) -> Tensor:
    """What the trace and the Frobenius norm leave for an eigenvalue that is not among these.

    Orthonormal Ritz vectors with the residuals R account for as many eigenvalues of A, within ‖R‖ of theirs (Kahan,
    "Inclusion theorems for clusters of eigenvalues of Hermitian matrices", 1967).
    """
    least = (values - torch.linalg.vector_norm(bounds)).clamp(min=0)
    rounding = operator.num_rows * torch.finfo(torch.float64).eps  # of sums over the rows
    limits = []
    if operator.squared_norm is not None:
        rest = operator.squared_norm * (1 + rounding) - float(least.square().sum())
        limits.append(math.sqrt(max(rest, 0.0)))
    if operator.trace is not None:
        limits.append(max(operator.trace * (1 + rounding) - float(least.sum()), 0.0))
    return torch.tensor(min(limits, default=math.nan), dtype=torch.float64, device="cpu")
