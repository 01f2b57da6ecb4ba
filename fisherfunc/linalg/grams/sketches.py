"""Random projections of gradients that need no gradient: a Kronecker product of one matrix a side of a weight.

The gradient of a weight (i, j) is Σ_s δ_s ⊗ a_s. With independent L (k₁, i) and R (k₂, j), entries N(0, 1/k₁) and
N(0, 1/k₂), its projection is Σ_s (L δ_s) ⊗ (R a_s) = L G Rᵀ: k₁ k₂ numbers. As E LᵀL = I and E RᵀR = I,

    E ⟨L G Rᵀ, L H Rᵀ⟩ = ⟨G, H⟩,      and, with c₁ = 1/k₁, c₂ = 1/k₂,

    Var = c₂ (‖GᵀH‖² + tr (GᵀH)²) + c₁ (‖GHᵀ‖² + tr (GHᵀ)²)
          + c₁ c₂ (‖G‖² ‖H‖² + ⟨GᵀG, HᵀH⟩ + ⟨GGᵀ, HHᵀ⟩ + ⟨G, H⟩²).

A side no longer than the rank is left as it is (c = 0), and so a small weight is exact. A tensor of one axis is
projected to at most rank² numbers. Convolutions are (out, all else), embeddings (ids, d).

Source: the moments of LᵀL by Isserlis' theorem (Biometrika 1918); such projections in general: Rakhshan and Rabusseau,
"Tensorized random projections", AISTATS 2020; of gradients of linear layers: Choe et al., "What is your data worth to
GPT?", 2024.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.factors.factors import PointFactors, SharedFactors


@dataclass(frozen=True, kw_only=True)
class Kronecker:
    """Which projections: made by `kronecker`.

    Attributes:
        rank: The most rows of the matrix of a side.
        seed: Another seed, other matrices.
    """

    rank: int
    seed: int


def kronecker(*, rank: int = 16, seed: int = 0) -> Kronecker:
    """Choose Kronecker projections of gradients: at most rank² numbers for each weight.

    Two independent projections are made of each, by which the error of anything that is computed from them is seen.

    Args:
        rank: k, the most numbers that are left of a side of a weight. The relative error of an inner product is about
            2/√k where gradients have rank one, and less where they have more.
        seed: Of the projections, with the name of each tensor (SHA-1): the same for whatever data, so that rows of
            several runs belong together.

    Raises:
        ValueError: If `rank` < 1.

    Example:
        >>> kronecker(rank=8)
        Kronecker(rank=8, seed=0)
    """
    if rank < 1:
        raise ValueError(f"rank expected at least 1, got rank={rank}")
    return Kronecker(rank=rank, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Projection:
    """G → L G Rᵀ of one tensor, `(i, j)` → `(k1, k2)`; a matrix that is None is the identity.

    Attributes:
        left: L.
        right: R.
        shape: (i, j).
    """

    left: Float[Tensor, "k1 i"] | None
    right: Float[Tensor, "k2 j"] | None
    shape: tuple[int, int]

    @property
    def num_columns(self) -> int:
        """How many numbers are left of a gradient."""
        sides = zip((self.left, self.right), self.shape, strict=True)
        return math.prod(size if matrix is None else len(matrix) for matrix, size in sides)

    @property
    def exact(self) -> bool:
        """Whether nothing is projected."""
        return self.left is None and self.right is None

    def of_gradients(self, rows: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Project gradients that are formed."""
        matrices = rows.reshape(len(rows), *self.shape)
        return _across(self.right, _across(self.left, matrices.mT).mT).flatten(1)

    def of_factors(self, factors: SharedFactors | PointFactors) -> Float[Tensor, "n k"]:
        """Project gradients that are factored. Cost: 2 k (d + e) operations a place, and 2 k² a place and row."""
        along, across = (self.left, self.right) if factors.axis == 0 else (self.right, self.left)
        own = _across(along, factors.own)
        if isinstance(factors, PointFactors):
            found = einsum(own, _across(across, factors.inputs), "n d, n e -> n d e")
        else:
            shared = factors.shared[: factors.own.shape[1]]
            if shared.is_floating_point():
                found = einsum(own, _across(across, shared), "n s d, s e -> n d e")
            else:
                found = self._by_ids(own, shared, across, self.shape[1 - factors.axis])
        return (found if factors.axis == 0 else found.mT).flatten(1)

    @staticmethod
    def _by_ids(own: Tensor, ids: Tensor, across: Tensor | None, num_ids: int) -> Tensor:
        if across is not None:
            return einsum(own, across.mT[ids].to(own), "n s d, s e -> n d e")
        formed = own.new_zeros(own.shape[0], num_ids, own.shape[2]).index_add(1, ids, own)
        return rearrange(formed, "n e d -> n d e")


def projections(sketch: Kronecker, name: str, shape: Sequence[int], *, like: Tensor) -> tuple[Projection, Projection]:
    """Return two independent projections of a tensor.

    Args:
        sketch: Which.
        name: Of the tensor.
        shape: Of the tensor.
        like: What has the dtype and device that they are to have.
    """
    rows, columns = (math.prod(shape), 1) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
    most = sketch.rank**2 if len(shape) < 2 else sketch.rank

    def matrix(side: str, size: int, half: int) -> Tensor | None:
        if size <= most:
            return None
        digest = hashlib.sha1(f"{sketch.seed}:{half}:{name}:{side}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        found = torch.randn(most, size, generator=generator, dtype=torch.float64, device="cpu")
        return (found / most**0.5).to(like)

    one, other = (
        Projection(left=matrix("left", rows, half), right=matrix("right", columns, half), shape=(rows, columns))
        for half in (0, 1)
    )
    return one, other


def variance(g: Tensor, h: Tensor, *, sketch: Kronecker) -> Float[Tensor, ""]:
    """Return the variance of ⟨S g, S h⟩ of one projection over seeds, for two gradients of one tensor.

    Args:
        g: A gradient, of the shape of the tensor.
        h: Another.
        sketch: Which projections.

    Raises:
        ValueError: If their shapes differ.

    Example:
        >>> variance(torch.ones(4), torch.ones(4), sketch=kronecker(rank=1))  # ‖L g‖², one number of variance 4
        tensor(32.)
    """
    if g.shape != h.shape:
        raise ValueError(f"g and h expected one shape, got {tuple(g.shape)} and {tuple(h.shape)}")
    rows = g.numel() if g.ndim < 2 else g.shape[0]
    most = sketch.rank**2 if g.ndim < 2 else sketch.rank
    one, other = g.reshape(rows, -1), h.reshape(rows, -1)
    left, right = (1 / most if size > most else 0.0 for size in one.shape)
    inside, outside = one.mT @ other, one @ other.mT
    both = one.square().sum() * other.square().sum() + (one * other).sum().square()
    both = both + ((one.mT @ one) * (other.mT @ other)).sum() + ((one @ one.mT) * (other @ other.mT)).sum()
    across = right * (inside.square().sum() + (inside * inside.mT).sum())
    along = left * (outside.square().sum() + (outside * outside.mT).sum())
    return across + along + left * right * both


def _across(matrix: Tensor | None, values: Tensor) -> Tensor:
    """The last axis, projected."""
    return values if matrix is None else values @ matrix.mT.to(values)
