"""Gradients of a weight as sums of outer products, and Gram matrices of them that never form a gradient.

A weight W used as y = x Wᵀ gives token n the gradient G_n = Σ_s δ_{n,s} ⊗ a_s: output cotangents δ of its own, inputs a
that all tokens of the sequence share. So ⟨G_n, G_m⟩ = Σ_{s,t} (δ_{n,s}·δ_{m,t}) (a_s·a_t). Where each token has one
place, G_n = δ_n ⊗ a_n and K = (Δ Δᵀ) ∘ (A Aᵀ).

Axis order: own factors `(n, s, d)`, shared factors `(s, e)` or ids `(s,)` for one-hot rows. `axis` says which axis of
the weight the own factor lies along: 0 for `nn.Linear` (out, in), 1 for `Conv1D` (in, out) and embeddings (ids, d).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

from fisherfunc.records.record import record

ENTRIES = 2**22
"""So many of inputs are compared at a time."""


@record(static=("axis",))
class SharedFactors:
    """G_n = Σ_s own_{n,s} ⊗ shared_s for rows of one sequence.

    Attributes:
        own: What each row has for itself; it may cover only the first places of `shared`, being zero at the others.
        shared: What the rows share: vectors, or the ids of one-hot vectors.
        axis: The axis of the weight that `own` lies along.
    """

    own: Float[Tensor, "n s d"]
    shared: Float[Tensor, "t e"] | Int[Tensor, " t"]
    axis: int


@record(static=("axis",))
class PointFactors:
    """G_n = own_n ⊗ shared_i: one place a row.

    Attributes:
        own: What each row has for itself.
        shared: The inputs.
        axis: The axis of the weight that `own` lies along.
        index: Which input each row has, in ascending order; its own where None.
    """

    own: Float[Tensor, "n d"]
    shared: Float[Tensor, "m e"]
    axis: int
    index: Int[Tensor, " n"] | None = None

    @property
    def inputs(self) -> Float[Tensor, "n e"]:
        """The input of each row."""
        return self.shared if self.index is None else self.shared[self.index]

    def merged(self) -> "PointFactors":
        """The same, equal inputs of rows that follow each other as one: those of several targets of one sample.

        Where that leaves more than half of them nothing is changed.
        """
        if self.index is not None:
            return self
        rows = max(1, ENTRIES // max(1, self.shared.shape[1]))
        pairs = zip(self.shared[1:].split(rows), self.shared[:-1].split(rows), strict=True)
        other = torch.cat([(row != before).any(dim=1) for row, before in pairs])
        if 2 * (1 + int(other.sum())) > len(self.shared):
            return self
        index = functional.pad(other.cumsum(0), (1, 0))
        return replace(self, shared=self.shared[functional.pad(other, (1, 0), value=True)], index=index)


Factors = SharedFactors | PointFactors


def cross_gram(rows: Factors, columns: Factors) -> Float[Tensor, "n m"]:
    """⟨G_n, G_m⟩ for the rows of two factored gradients of one weight.

    Cost for S and T places: 2 M S T d + 2 N M S d for a shared pair along one axis; 2 N M d for points.
    """
    if isinstance(rows, PointFactors):
        return _point_cross(rows, columns) if isinstance(columns, SharedFactors) else _point_gram(rows, columns)
    if isinstance(columns, PointFactors):
        return _point_cross(columns, rows).mT
    return _aligned(rows, columns) if rows.axis == columns.axis else _crossed(rows, columns)


def form_gradients(factors: Factors, shape: Sequence[int]) -> Float[Tensor, "n i j"]:
    """The gradients themselves, (N, *shape): what every other function here avoids.

    Args:
        factors: The factors.
        shape: Of the weight, which gives the length of one-hot rows.
    """
    shared = factors.inputs if isinstance(factors, PointFactors) else _covered(factors)
    if isinstance(factors, PointFactors):
        formed = einsum(factors.own, shared, "n d, n e -> n d e")
    elif shared.ndim == 2:
        formed = einsum(factors.own, shared, "n s d, s e -> n d e")
    else:
        formed = factors.own.new_zeros(factors.own.shape[0], shape[1 - factors.axis], factors.own.shape[2])
        formed = rearrange(formed.index_add(1, shared, factors.own), "n e d -> n d e")
    return formed if factors.axis == 0 else formed.mT


def inner_products(shared: Tensor, other: Tensor) -> Shaped[Tensor, "s t"]:
    """Inner products of shared vectors; of one-hot vectors where they are ids (then whether two are equal)."""
    if shared.ndim == 1 and other.ndim == 1:
        return shared[:, None] == other[None, :]
    if shared.ndim == 2 and other.ndim == 2:
        return shared @ other.mT
    return other[:, shared].mT if shared.ndim == 1 else shared[:, other]


def _aligned(rows: SharedFactors, columns: SharedFactors) -> Float[Tensor, "n m"]:
    inner = inner_products(_covered(rows), _covered(columns)).to(columns.own.dtype)
    return rearrange(rows.own, "n s d -> n (s d)") @ rearrange(inner @ columns.own, "m s d -> (s d) m")


def _covered(factors: SharedFactors) -> Tensor:
    """The shared factors of the places that the own ones cover."""
    return factors.shared[: factors.own.shape[1]]


def _crossed(rows: SharedFactors, columns: SharedFactors) -> Float[Tensor, "n m"]:
    """Own along one axis against own along the other: Σ_{s,t} (own_{n,s}·shared'_t) (shared_s·own'_{m,t})."""
    left = _project(rows.own, _covered(columns))
    right = rearrange(_project(columns.own, _covered(rows)), "m t s -> m s t")
    return rearrange(left, "n s t -> n (s t)") @ rearrange(right, "m s t -> (s t) m")


def _project(own: Float[Tensor, "n s d"], shared: Tensor) -> Float[Tensor, "n s t"]:
    return own[:, :, shared] if shared.ndim == 1 else own @ shared.mT


def _point_gram(rows: PointFactors, columns: PointFactors) -> Float[Tensor, "n m"]:
    one, other = (rows.own, rows.inputs), (columns.own, columns.inputs)
    if rows.axis != columns.axis:
        other = other[::-1]
    return (one[0] @ other[0].mT) * (one[1] @ other[1].mT)


def _point_cross(rows: PointFactors, columns: SharedFactors) -> Float[Tensor, "n m"]:
    """Σ_t (x_n·own_{m,t}) (y_n·shared_t), with x the point factor along the axis of `own`, y the other."""
    along, across = (rows.own, rows.inputs) if columns.axis == rows.axis else (rows.inputs, rows.own)
    shared = _covered(columns)
    weights = across[:, shared] if shared.ndim == 1 else across @ shared.mT
    return einsum(columns.own @ along.mT, weights, "m t n, n t -> n m")
