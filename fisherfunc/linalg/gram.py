"""Grams and their algebra: what a centred, selected, summed, weighted or regrouped gradient matrix does to K = G Gᵀ.

Each function is Gram → Gram, and carries along what the resolution of a spectrum needs. Under each, a stack of Grams
stays a stack. Axis order: a Gram is `(*stack, n, m)`, unnormalised; a gradient matrix is `(n, p)`, one row a unit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.records.record import record

__all__ = ["Gram", "centred", "of_rows", "regrouped", "selected", "summed", "weighted"]

TILE = 4096


@record(static=("num_units", "num_params", "precision"))
class Gram:
    """The unnormalised Gram K = G Gᵀ of the gradients of N units, what spectral kernels take; (1/N) Gᵀ G is F.

    Attributes:
        matrix: K, or a stack of them.
        num_units: N, by which a kernel divides: the number of rows n, or n/T where each unit has T targets.
        num_params: P; where given, only the min(n, P) eigenvalues that can be nonzero are kept.
        precision: The coarsest dtype in which something of G was computed; that of the matrix where None.
        scale: The norm of K before a cancellation (centring, summing), where round-off entered; None where none was.
        error: An upper estimate of ‖K̂ − K‖ for K̂ as computed; None where it was not measured.

    Example:
        >>> import fisherfunc as ff
        >>> gram = ff.Gram(matrix=torch.tensor([[4.0, 0.0], [0.0, 2.0]]), num_units=2)
        >>> ff.kernels.gram_eigh()(ff.gram.weighted(gram, torch.tensor([1.0, 2.0]))).eigenvalues
        tensor([4., 2.], dtype=torch.float64)
    """

    matrix: Float[Tensor, "*stack n n"]
    num_units: int
    num_params: int | None = None
    precision: torch.dtype | None = None
    scale: Float[Tensor, "*stack"] | None = None
    error: Float[Tensor, "*stack"] | None = None

    @property
    def norm(self) -> Float[Tensor, "*stack"]:
        """The norm that round-off goes with: the scale, or ‖K‖_F where nothing has cancelled."""
        return torch.linalg.matrix_norm(self.matrix) if self.scale is None else self.scale

    @property
    def rows_in(self) -> torch.dtype:
        """The dtype in which G was computed."""
        return self.precision or self.matrix.dtype


def of_rows(rows: Float[Tensor, "*stack n p"], *, dtype: torch.dtype | None = None) -> Gram:
    """Return the Gram of a gradient matrix, a row a unit. Cost 2 N² P operations.

    Args:
        rows: G.
        dtype: The dtype to accumulate in; that of the rows where None.
    """
    num_rows, num_params = rows.shape[-2:]
    return Gram(matrix=gram_of(rows, dtype=dtype), num_units=num_rows, num_params=num_params, precision=rows.dtype)


def centred(gram: Gram) -> Gram:
    """Return the Gram of the rows less their mean, H K H with H = I − 11ᵀ/n: that behind the gradient covariance."""
    return replace(gram, matrix=centred_matrix(gram.matrix), scale=gram.norm)


def selected(gram: Gram, index: Tensor | Sequence[int]) -> Gram:
    """Return the Gram of chosen rows, a submatrix; N becomes the number of their units.

    Args:
        gram: The Gram.
        index: The rows, in the order that they are to have, or a mask of all rows.

    Raises:
        ValueError: If no row is chosen, or not all rows of a unit that has several.
    """
    index = torch.as_tensor(index, device=gram.matrix.device)
    index = index.nonzero().flatten() if index.dtype == torch.bool else index
    return replace(gram, matrix=gram.matrix[..., index, :][..., index], num_units=_num_units(gram, len(index)))


def summed(grams: Iterable[Gram]) -> Gram:
    """Return the Gram of the rows of all side by side, Σ K: that of a block of parameters, from those of its parts.

    Raises:
        ValueError: If there is none, or they are not of one number of units.
    """
    parts = list(grams)
    if not parts:
        raise ValueError("a sum of Grams needs at least one, got none")
    for part in parts[1:]:
        if part.num_units != parts[0].num_units or part.matrix.shape[-1] != parts[0].matrix.shape[-1]:
            shapes = [(one.num_units, tuple(one.matrix.shape)) for one in (parts[0], part)]
            raise ValueError(
                f"a sum of Grams expected Grams of the same rows, got num_units and shape {shapes[0]} and {shapes[1]}; "
                "select the same rows of each first"
            )
    sizes = [part.num_params for part in parts]
    errors = [part.error for part in parts]
    return Gram(
        matrix=parts[0].matrix.clone() if len(parts) == 1 else _total(part.matrix for part in parts),
        num_units=parts[0].num_units,
        num_params=None if None in sizes else _total(sizes),
        precision=_coarsest([part.rows_in for part in parts]),
        scale=None if all(part.scale is None for part in parts) else _total(part.norm for part in parts),
        error=None if any(error is None for error in errors) else _total(errors),
    )


def weighted(gram: Gram, weights: Float[Tensor, "*stack n"]) -> Gram:
    """Return the Gram of the rows scaled by weights, D K D with D = diag(weights). N stays what F divides by.

    Args:
        gram: The Gram.
        weights: A number per row; a row of weight √w counts w times.
    """
    largest = weights.square().amax(dim=-1)
    return replace(
        gram,
        matrix=weights[..., :, None] * gram.matrix * weights[..., None, :],
        scale=None if gram.scale is None else largest * gram.scale,
        error=None if gram.error is None else largest * gram.error,
    )


def regrouped(gram: Gram, group: Int[Tensor, " n"], num_groups: int) -> Gram:
    """Return the Gram of the rows summed within each group, M K Mᵀ with M their indicator; N counts groups.

    Args:
        gram: The Gram of single rows.
        group: The group of each row, from 0 to `num_groups` − 1.
        num_groups: How many groups there are.

    Raises:
        ValueError: If the groups are not those of whole units.
    """
    rows = torch.ones_like(group)
    longest = torch.zeros(num_groups, dtype=rows.dtype, device=rows.device).index_add(0, group, rows).max()
    return replace(  # ‖M K Mᵀ‖ is at most `longest` times ‖K‖
        gram,
        matrix=regrouped_matrix(gram.matrix, group, num_groups),
        num_units=_num_units(gram, num_groups),
        scale=longest * gram.norm,
        error=None if gram.error is None else longest * gram.error,
    )


def as_gram(given: Any, *, num_units: int | None = None, num_tokens: int | None = None, **context: Any) -> Gram:
    """Return a Gram as it is, or that of a plain matrix K: what a kernel was called with.

    Args:
        given: A `Gram`, or a matrix.
        num_units: N of a matrix; its size where None.
        num_tokens: The same, by the name that it had before.
        **context: The other fields of a `Gram`, of a matrix.

    Raises:
        TypeError: If it is neither, or a `Gram` with something beside it.
        ValueError: If the matrix is not square.
    """
    num_units = num_tokens if num_units is None else num_units
    if isinstance(given, Gram):
        beside = {"num_units": num_units, **context}
        named = [name for name, value in beside.items() if value is not None]
        if named:
            raise TypeError(f"a kernel got an ff.Gram and {named} beside it; a Gram has these: use dataclasses.replace")
        return given
    if not isinstance(given, Tensor):
        raise TypeError(
            f"a kernel expected an ff.Gram (or its matrix, a tensor), got {type(given).__name__}; Grams of a pass are "
            "grams[name] and grams.summed(names), and ff.gram.of_rows(rows) makes one"
        )
    if given.ndim < 2 or given.shape[-1] != given.shape[-2]:
        raise ValueError(
            f"a kernel of Grams expected a square Gram (n, n), got a matrix of shape {tuple(given.shape)}; a gradient "
            "matrix goes into kernels.of_rows(kernel), or into a kernel of rows such as kernels.svd()"
        )
    return Gram(matrix=given, num_units=given.shape[-1] if num_units is None else num_units, **context)


def gram_of(rows: Float[Tensor, "*stack n p"], *, dtype: torch.dtype | None = None) -> Float[Tensor, "*stack n n"]:
    """K = G Gᵀ. Cost 2 N² P operations.

    Args:
        rows: The gradient matrix G, one row a unit.
        dtype: The dtype to accumulate in; that of the rows where None.
    """
    rows = rows if dtype is None else rows.to(dtype)
    return einsum(rows, rows, "... n p, ... m p -> ... n m")


def centred_matrix(matrix: Float[Tensor, "*stack n n"]) -> Float[Tensor, "*stack n n"]:
    """H K H with H = I − 11ᵀ/n."""
    column_means = matrix.mean(dim=-2, keepdim=True)
    row_means = matrix.mean(dim=-1, keepdim=True)
    return matrix - column_means - row_means + row_means.mean(dim=-2, keepdim=True)


def regrouped_matrix(
    matrix: Float[Tensor, "*stack n n"], group: Int[Tensor, " n"], num_groups: int
) -> Float[Tensor, "*stack m m"]:
    """M K Mᵀ with M the indicator of the groups."""
    columns = matrix.new_zeros(*matrix.shape[:-1], num_groups).index_add(-1, group, matrix)
    return matrix.new_zeros(*matrix.shape[:-2], num_groups, num_groups).index_add(-2, group, columns)


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


def _num_units(gram: Gram, num_rows: int) -> int:
    """N of other rows: as many to a unit as there were."""
    units, rest = divmod(num_rows * gram.num_units, gram.matrix.shape[-1])
    if rest or not units:
        raise ValueError(
            f"{num_rows} rows were chosen or made of {gram.matrix.shape[-1]} rows of {gram.num_units} units; a "
            "spectrum needs at least one unit, and all rows of each"
        )
    return units


def _coarsest(dtypes: list[torch.dtype]) -> torch.dtype:
    coarsest = dtypes[0]
    for dtype in dtypes[1:]:  # max(…, key=…) would break a graph of torch.compile
        coarsest = dtype if torch.finfo(dtype).eps > torch.finfo(coarsest).eps else coarsest
    return coarsest


def _total(parts: Iterable[Any]) -> Any:
    """Σ of numbers or tensors, of which none is written to: `vmap` may map over some."""
    first, *others = parts
    return sum(others, start=first)
