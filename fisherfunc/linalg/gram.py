"""Gram algebra: what a centred, selected, regrouped or summed gradient matrix does to K = G Gᵀ.

Axis order: a Gram is `(n, m)`, unnormalised; a gradient matrix is `(n, p)`, one row a unit.
"""

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

TILE = 4096


def gram_of(rows: Float[Tensor, "*stack n p"], *, dtype: torch.dtype | None = None) -> Float[Tensor, "*stack n n"]:
    """K = G Gᵀ. Cost 2 N² P operations.

    Args:
        rows: The gradient matrix G, one row a unit.
        dtype: The dtype to accumulate in; that of the rows where None.
    """
    rows = rows if dtype is None else rows.to(dtype)
    return einsum(rows, rows, "... n p, ... m p -> ... n m")


def gram_norm(rows: Float[Tensor, "n p"], *, dtype: torch.dtype = torch.float64) -> Float[Tensor, ""]:
    """‖G Gᵀ‖_F = ‖Gᵀ G‖_F, from the smaller of the two. Cost 2 N P min(N, P) operations.

    Args:
        rows: The gradient matrix G.
        dtype: The dtype to accumulate in.
    """
    narrow = rows if rows.shape[0] <= rows.shape[1] else rows.mT
    return torch.linalg.matrix_norm(gram_of(narrow, dtype=dtype))


def squares_vanish(trace: float) -> bool:
    """Whether squares of this sum, if of rows that are not zero, have lost bits or vanished in float64."""
    return trace < torch.finfo(torch.float64).tiny / torch.finfo(torch.float64).eps


def raise_vanished(largest: float) -> None:
    """Raise a ValueError that names the largest entry of gradients whose squares vanish, if that is not zero."""
    if largest > 0:
        raise ValueError(
            f"the gradients are so small, their largest entry is {largest:.1e}, that their squares vanish in float64 "
            f"and F would be zero; scale the loss, by {1 / largest:.0e} say: eigenvalues go with the square of that"
        )


def accumulate_rows(gram: Float[Tensor, "n n"], rows: Float[Tensor, "n p"]) -> None:
    """K += G Gᵀ in the dtype of K, tile by tile of columns, so that no wide copy is made. `gram` is written to."""
    for tile in rows.split(TILE, dim=1):
        widened = tile.to(gram.dtype)
        gram.addmm_(widened, widened.mT)


def centred(gram: Float[Tensor, "*stack n n"]) -> Float[Tensor, "*stack n n"]:
    """H K H with H = I − 11ᵀ/N: the Gram of the rows less their mean."""
    column_means = gram.mean(dim=-2, keepdim=True)
    row_means = gram.mean(dim=-1, keepdim=True)
    return gram - column_means - row_means + row_means.mean(dim=-2, keepdim=True)


def selected(gram: Float[Tensor, "n n"], index: Int[Tensor, " m"]) -> Float[Tensor, "m m"]:
    """The Gram of the chosen rows: a submatrix."""
    return gram[index][:, index]


def regrouped(gram: Float[Tensor, "n n"], group: Int[Tensor, " n"], num_groups: int) -> Float[Tensor, "m m"]:
    """M K Mᵀ with M the indicator of the groups: the Gram of the rows summed within each group.

    Args:
        gram: The Gram of single rows.
        group: The group of each row, from 0 to `num_groups` − 1.
        num_groups: How many groups there are.
    """
    columns = gram.new_zeros(gram.shape[0], num_groups).index_add(1, group, gram)
    return gram.new_zeros(num_groups, num_groups).index_add(0, group, columns)


def reweighted(gram: Float[Tensor, "n n"], weights: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """D K D with D = diag(weights): the Gram of the rows scaled by the weights."""
    return weights[:, None] * gram * weights[None, :]
