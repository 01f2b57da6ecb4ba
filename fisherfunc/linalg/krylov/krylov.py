"""An orthonormal basis of {q, A q, A² q, …} for A = K/N, in float64, by the Lanczos process with all vectors kept.

From b first vectors in place of one it is that of {q₁ … q_b, A q₁ … A q_b, …}, and b vectors wait to be multiplied at
any time: where a product is mostly a read of a file, one read serves them all (Ruhe, "Implementation aspects of band
Lanczos algorithms", 1979). With the computed product Ã the basis Q `(m, n)` and the matrix H `(m + b, m)` satisfy
Ã Qᵀ = Qᵀ₊ H to the rounding of float64: every vector is made orthogonal to all before it, twice (Giraud, Langou and
Rozložník, "The loss of orthogonality in the Gram-Schmidt orthogonalization process", 2005), and H keeps every
coefficient. For an exact symmetric product H is symmetric, with b entries on each side of the diagonal; what it lacks
of that is the round-off of the products. Axis order: steps `m`, rows `n`, vectors that wait `b`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.krylov.token_operator import TokenOperator

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
        column: `(m + b,)` of the m-th, the coefficients of the product by all vectors so far, and by the new one.
        vector: The new vector of the basis, which waits behind the b − 1 others; zeros where the basis is complete.
    """

    column: Float[Tensor, " m"]
    vector: Float[Tensor, " n"]


Keep = Callable[[Step], None]


class Krylov:
    """The basis and the coefficients so far.

    Args:
        start: The first vectors, independent of each other; at most n.
        capacity: The most steps; no more than n are made.
        seed: Of the vectors to go on with where the basis spans an invariant subspace.
    """

    def __init__(self, start: Float[Tensor, "b n"], capacity: int, seed: int) -> None:
        self._seed = seed
        self._width, num_rows = start.shape
        self._capacity = min(capacity, num_rows)
        self._vectors = start.new_zeros(self._capacity + self._width, num_rows, dtype=torch.float64)
        for number, vector in enumerate(start.double()):
            rest, _ = _orthogonal(vector, self._vectors[:number])
            self._vectors[number] = rest / torch.linalg.vector_norm(rest)
        shape = (self._capacity + self._width, self._capacity)
        self._columns = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self.num_steps = 0

    @property
    def full(self) -> bool:
        """Whether no more steps are made."""
        return self.num_steps == self._capacity

    @property
    def basis(self) -> Float[Tensor, "m n"]:
        """Q, the vectors that have been multiplied."""
        return self._vectors[: self.num_steps]

    @property
    def all(self) -> Float[Tensor, "m_b n"]:
        """Q₊: these, and those that wait."""
        return self._vectors[: self.num_steps + self._width]

    @property
    def waiting(self) -> Float[Tensor, "b n"]:
        """The vectors to be multiplied next; fewer at the end."""
        return self._vectors[self.num_steps : min(self.num_steps + self._width, self._capacity)]

    @property
    def coefficients(self) -> Float[Tensor, "m_b m"]:
        """H, on the CPU."""
        return self._columns[: self.num_steps + self._width, : self.num_steps]

    def add(self, step: Step) -> None:
        """Take a step that was made."""
        self._columns[: len(step.column), self.num_steps] = step.column
        self._vectors[self.num_steps + self._width] = step.vector
        self.num_steps += 1

    @property
    def round_off(self) -> float:
        """What float64 may lose of a product here: below it, what a product has outside of the basis is rounding."""
        root = self._vectors.shape[1] ** 0.5
        return BREAKDOWN * torch.finfo(torch.float64).eps * root * float(self._columns.abs().max())

    def made(self, product: Float[Tensor, " n"]) -> Step:
        """Make the step that the product of the first vector that waits gives."""
        seen = self.all
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


def grow(
    operator: TokenOperator, spaces: Mapping[int, Krylov], keep: Callable[[int, Step], None] | None = None
) -> None:
    """Multiply all that waits in some spaces, in one product where the operator has it, and add the steps to these.

    Args:
        operator: Gives the products.
        spaces: By number; none of them full.
        keep: Called with the number and each step that is made.

    Raises:
        ValueError: If a product is not finite.
    """
    waiting = {number: space.waiting for number, space in spaces.items()}
    products = operator.products(torch.cat(list(waiting.values()))).double()
    for (number, space), some in zip(spaces.items(), products.split(list(map(len, waiting.values()))), strict=True):
        for product in some:
            if not bool(product.isfinite().all()):
                raise ValueError(
                    f"product {space.num_steps + 1} with {operator.name} is not finite; check the model's weights and "
                    "dtype"
                )
            step = space.made(product)
            if keep is not None:
                keep(number, step)
            space.add(step)


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
    inside = matrix[: space.num_steps]
    lacking = float(torch.linalg.matrix_norm(inside - inside.mT)) / len(inside) ** 0.5
    floor = max(lacking, space.round_off)
    if operator.reference_product is None:
        return MARGIN * floor, 0
    num = vectors.shape[1]
    signs = (2.0 * torch.randint(0, 2, (num,), generator=torch.Generator().manual_seed(num), device="cpu") - 1).double()
    combinations = vectors if operator.num_rows <= FEW_ROWS else (vectors @ signs)[:, None]
    whole, errors = space.all, []
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
    return random_vectors(1, count, seed)[0]


def random_vectors(width: int, count: int, seed: int) -> Float[Tensor, "b n"]:
    """Draw several of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, count, generator=generator, dtype=torch.float64, device="cpu")
