"""A matrix F = (1/N) Gᵀ G seen from its rows: products u → K u/N with the matrix that it shares its spectrum with.

K = G Gᵀ, and the nonzero eigenvalues of K/N are those of F. Axis order: vectors `(n,)` over the rows of G, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

VectorProduct = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenOperator:
    """Products with K/N, and what is known of it.

    Attributes:
        token_product: u → K u/N, of a float64 vector over the rows, as a float64 vector.
        reference_product: The same by the most precise arithmetic there is, by which round-off is measured;
            `token_product` itself where there is no better one, None where nothing is to be measured.
        num_rows: n, the rows of G.
        num_tokens: N, what K is divided by.
        num_params: P, or None where only a Gram was given.
        device: Where vectors lie.
        trace: tr F, where it is known exactly.
        squared_norm: ‖F‖_F², where it is known exactly.
        inexact: How far the matrix of the products may be from K/N in norm, which no product shows: of numbers that
            were rounded to be stored.
        name: What results call the operator.
        block_product: `token_product` of several vectors at once, (n, k) → (n, k), where that is cheaper than one by
            one: of a Gram in a file, which is read once for all of them. None where it is not.
    """

    token_product: VectorProduct
    reference_product: VectorProduct | None
    num_rows: int
    num_tokens: int
    num_params: int | None
    device: torch.device
    trace: float | None = None
    squared_norm: float | None = None
    inexact: float = 0.0
    name: str = "operator"
    block_product: Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]] | None = None

    def products(self, vectors: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """Multiply several vectors, at once where that is cheaper."""
        if self.block_product is not None:
            return self.block_product(vectors.mT).mT
        return torch.stack([self.token_product(u) for u in vectors])


def gram_operator(
    gram: Float[Tensor, "n n"], *, num_tokens: int | None = None, num_params: int | None = None
) -> TokenOperator:
    """Return the operator of a Gram at hand, whose trace and Frobenius norm are known. Cost 2 N² operations a product.

    Args:
        gram: K = G Gᵀ, unnormalised.
        num_tokens: N, what K is divided by; the number of rows where None.
        num_params: P, where it is known.

    Raises:
        ValueError: If the matrix is not square, or holds a number that is not finite.

    Example:
        >>> operator = gram_operator(torch.diag(torch.tensor([4.0, 2.0])))
        >>> operator.token_product(torch.tensor([1.0, 1.0], dtype=torch.float64)), operator.trace
        (tensor([2., 1.], dtype=torch.float64), 3.0)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool(gram.isfinite().all()):
        raise ValueError(
            f"gram expected a finite square matrix, got shape {tuple(gram.shape)}; give one of .grams of token_grams"
        )
    matrix, count = gram.double(), num_tokens or len(gram)

    def product(u: Tensor) -> Tensor:
        return matrix @ u / count

    return TokenOperator(
        token_product=product,
        reference_product=product,
        num_rows=len(matrix),
        num_tokens=count,
        num_params=num_params,
        device=matrix.device,
        trace=float(matrix.diagonal().sum()) / count,
        squared_norm=float(torch.linalg.matrix_norm(matrix) / count) ** 2,
        name="gram",
    )
