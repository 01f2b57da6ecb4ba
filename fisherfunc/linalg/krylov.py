"""An orthonormal basis of {q, A q, A² q, …} for A = K/N, in float64, by the Lanczos process with all vectors kept.

With the computed product Ã the basis Q `(m, n)` and the matrix H `(m + 1, m)` satisfy Ã Qᵀ = Qᵀ₊ H to the rounding of
float64: every vector is made orthogonal to all before it, twice (Giraud, Langou and Rozložník, "The loss of
orthogonality in the Gram-Schmidt orthogonalization process", 2005), and H keeps every coefficient. For an exact
symmetric product H is tridiagonal and symmetric; what it lacks of that is the round-off of the products. Axis order:
steps `m`, rows `n`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.token_operator import TokenOperator

BREAKDOWN = 16.0
"""In √n eps of the largest coefficient: what is left of a product that lies in the basis is rounding of float64."""

MARGIN = 3.0
"""What a measured round-off is multiplied by: a sum of errors with random signs may be smaller than one of them."""
FEW_ROWS = 16
"""Up to so many rows errors may point in one direction, and a sum of them may cancel: each is measured by itself."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one product adds; from all of them the process goes on where it was stopped, to the same bits.

    Attributes:
        column: `(m + 1,)`, the coefficients of the product of the last vector by the basis, and by the next vector.
        vector: The next vector of the basis; zeros where the basis is complete.
    """

    column: Float[Tensor, " m"]
    vector: Float[Tensor, " n"]


Keep = Callable[[Step], None]


class Krylov:
    """The basis and the coefficients so far.

    Args:
        start: The first vector, of any length but zero.
        capacity: The most steps.
        seed: Of the vectors to go on with where the basis spans an invariant subspace.
    """

    def __init__(self, start: Float[Tensor, " n"], capacity: int, seed: int) -> None:
        self._seed = seed
        self._vectors = start.new_zeros(capacity + 1, len(start), dtype=torch.float64)
        self._vectors[0] = start.double() / torch.linalg.vector_norm(start.double())
        self._columns = torch.zeros(capacity + 1, capacity, dtype=torch.float64, device="cpu")
        self.num_steps = 0

    @property
    def basis(self) -> Float[Tensor, "m n"]:
        """Q, the vectors that have been multiplied."""
        return self._vectors[: self.num_steps]

    @property
    def next(self) -> Float[Tensor, " n"]:
        """The vector to be multiplied next."""
        return self._vectors[self.num_steps]

    @property
    def coefficients(self) -> Float[Tensor, "m_1 m"]:
        """H, on the CPU."""
        return self._columns[: self.num_steps + 1, : self.num_steps]

    @property
    def remainder(self) -> float:
        """The norm of what the last product has outside of the basis."""
        return float(self._columns[self.num_steps, self.num_steps - 1])

    def add(self, step: Step) -> None:
        """Take a step that was made."""
        self._columns[: len(step.column), self.num_steps] = step.column
        self.num_steps += 1
        self._vectors[self.num_steps] = step.vector

    @property
    def round_off(self) -> float:
        """What float64 may lose of a product here: below it, what a product has outside of the basis is rounding."""
        return BREAKDOWN * torch.finfo(torch.float64).eps * len(self.next) ** 0.5 * float(self._columns.abs().max())

    def made(self, product: Float[Tensor, " n"]) -> Step:
        """Make the step that a product of the next vector gives."""
        seen = self._vectors[: self.num_steps + 1]
        rest, column = _orthogonal(product, seen)
        norm = torch.linalg.vector_norm(rest)
        size = float(torch.linalg.vector_norm(column))
        rounding = max(self.round_off, BREAKDOWN * torch.finfo(torch.float64).eps * len(rest) ** 0.5 * size)
        if float(norm) > rounding and len(seen) < len(rest):
            return Step(column=torch.cat([column, norm[None]]).cpu(), vector=rest / norm)
        other = torch.zeros_like(rest)
        if len(seen) < len(rest):  # the basis spans an invariant subspace: go on in what is orthogonal to it
            other, _ = _orthogonal(random_vector(len(rest), self._seed + self.num_steps + 1).to(rest), seen)
            other = other / torch.linalg.vector_norm(other)
        return Step(column=torch.cat([column, torch.zeros_like(norm)[None]]).cpu(), vector=other)


def grown(
    operator: TokenOperator,
    start: Float[Tensor, " n"],
    *,
    num_steps: int,
    seed: int,
    steps: Iterable[Step] = (),
    keep: Keep | None = None,
) -> Iterator[Krylov]:
    """Grow a basis, a product a step; it is complete after n of them.

    Args:
        operator: Gives the products.
        start: The first vector.
        num_steps: The most products.
        seed: Of the vectors to go on with where a basis spans an invariant subspace.
        steps: Those that were made before.
        keep: Called with each that is made.

    Yields:
        The same object after each step, those that were made before as one.

    Raises:
        ValueError: If a product is not finite.
    """
    capacity = min(num_steps, operator.num_rows)
    found = Krylov(start, capacity, seed)
    for step in list(steps)[:capacity]:
        found.add(step)
    if found.num_steps:
        yield found
    while found.num_steps < capacity:
        product = operator.token_product(found.next)
        if not bool(product.isfinite().all()):
            raise ValueError(
                f"product {found.num_steps + 1} with {operator.name} is not finite; check the model's weights and dtype"
            )
        step = found.made(product.double())
        if keep is not None:
            keep(step)
        found.add(step)
        yield found


def measured_round_off(operator: TokenOperator, space: Krylov, vectors: Float[Tensor, "m k"]) -> tuple[float, int]:
    """Measure how far products of vectors of the basis are from those of exact arithmetic.

    With the error E of the products and random signs c, E‖E Σ c_k y_k‖² = Σ ‖E y_k‖² is no less than any ‖E y_k‖². What
    the products of the basis say of Σ c_k y_k is held against one product by the most precise arithmetic there is; no
    less is returned than what H lacks of symmetry, and than the rounding of float64.

    Args:
        operator: Gives the products.
        space: The basis.
        vectors: The coefficients of y_k in it.

    Returns:
        `MARGIN` times the error, and how many products it took.
    """
    matrix = space.coefficients
    inside = matrix[:-1]
    lacking = float(torch.linalg.matrix_norm(inside - inside.mT)) / len(inside) ** 0.5
    floor = max(lacking, space.round_off)
    if operator.reference_product is None:
        return MARGIN * floor, 0
    num = vectors.shape[1]
    signs = (2.0 * torch.randint(0, 2, (num,), generator=torch.Generator().manual_seed(num), device="cpu") - 1).double()
    combinations = vectors if operator.num_rows <= FEW_ROWS else (vectors @ signs)[:, None]
    whole, errors = torch.cat([space.basis, space.next[None]]), []
    for combination in combinations.unbind(1):
        exact = operator.reference_product(combination.to(whole) @ space.basis).double()
        errors.append(float(torch.linalg.vector_norm(exact - (matrix @ combination).to(whole) @ whole)))
    return MARGIN * max(sum(error**2 for error in errors) ** 0.5, floor), len(errors)


def _orthogonal(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What a vector has outside of a basis, and its coefficients in it; twice is enough."""
    first = basis @ vector
    rest = vector - first @ basis
    again = basis @ rest
    return rest - again @ basis, first + again


def random_vector(count: int, seed: int) -> Float[Tensor, " n"]:
    """Draw a vector of independent normal numbers, on the CPU; no global generator moves."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
