"""Subspaces of parameter space, each spanned by k orthonormal trees: projections and overlaps.

Axis order: vectors {name: (k, *shape)}.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.trees import check_alike, combined, inner, stacked
from fisherfunc.records.axes import Params
from fisherfunc.records.record import record


@record()
class Projection:
    """The part of a tree that lies in a subspace.

    Attributes:
        coefficients: ⟨v_k, x⟩, one a vector.
        tree: Σ_k ⟨v_k, x⟩ v_k, of the shapes of x.
        fraction: ‖Px‖²/‖x‖², between 0 and 1; NaN for x = 0.
    """

    coefficients: Float[Tensor, " k"]
    tree: dict[str, Tensor]
    fraction: Float[Tensor, ""]


@record()
class Overlap:
    """How far two subspaces are the same.

    Attributes:
        overlap: ‖V_aᵀ V_b‖_F²/k, k the smaller dimension: 1 where one subspace holds the other, 0 where they are
            orthogonal.
        angles: The k principal angles in radians, smallest first.
    """

    overlap: Float[Tensor, ""]
    angles: Float[Tensor, " k"]


def project(tree: Params, vectors: Params) -> Projection:
    """The orthogonal projection P x = V Vᵀ x of a weight update, a task vector, a gradient … onto leading directions.

    Cost 4 k P operations, and 2 k² P to see that the vectors are orthonormal.

    Args:
        tree: x, {name: shape}.
        vectors: V, k orthonormal vectors {name: (k, *shape)}, such as `Eigenvectors.vectors`.

    Raises:
        ValueError: If names or shapes differ (it names them), or the vectors are not orthonormal.

    Example:
        >>> found = project({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([[0.0, 1.0]])})
        >>> found.tree["w"].tolist(), round(found.fraction.item(), 2)
        ([0.0, 4.0], 0.64)
    """
    check_orthonormal(vectors, what="vectors")
    check_alike(tree, {name: v.shape[1:] for name, v in vectors.items()}, what="the tree")
    one = stacked(tree)
    coefficients = inner(one, vectors)
    projected = {name: p[0] for name, p in combined(coefficients, vectors).items()}
    fraction = coefficients.square().sum() / inner(one, one)[0, 0]
    return Projection(coefficients=coefficients[0], tree=projected, fraction=fraction)


def subspace_overlap(a: Params, b: Params) -> Overlap:
    """The overlap and the principal angles of two subspaces, such as those that two checkpoints' eigenvectors span.

    The cosines are the singular values of V_aᵀ V_b; angles below π/4 come from the sines, the singular values of
    V_b − V_a V_aᵀ V_b, as the arc cosine loses half of the digits there. Cost about 8 k² P operations.

    Args:
        a: V_a, orthonormal vectors {name: (k, *shape)}.
        b: V_b, likewise; their numbers may differ.

    Raises:
        ValueError: If names or shapes differ (it names them), or the vectors of one are not orthonormal.

    Source: Björck and Golub, "Numerical methods for computing angles between linear subspaces", Mathematics of
    Computation 1973.

    Example:
        >>> one, other = {"w": torch.eye(3)[:2]}, {"w": torch.eye(3)[1:]}
        >>> found = subspace_overlap(one, other)
        >>> found.overlap.item(), [round(angle, 2) for angle in found.angles.tolist()]
        (0.5, [0.0, 1.57])
    """
    check_alike({n: v[0] for n, v in b.items()}, {n: v.shape[1:] for n, v in a.items()}, what="the second subspace")
    check_orthonormal(a, what="the first subspace")
    check_orthonormal(b, what="the second subspace")
    if _size(a) < _size(b):
        a, b = b, a
    between = inner(a, b)
    inside = combined(between.mT, a)
    outside = {name: v - inside[name] for name, v in b.items()}
    cosines = torch.linalg.svdvals(between).clamp(max=1.0)
    sines = torch.linalg.eigvalsh(inner(outside, outside)).clamp(0.0, 1.0).sqrt()
    angles = torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos())
    return Overlap(overlap=between.square().sum() / len(cosines), angles=angles)


def orthonormalised(vectors: Params) -> tuple[dict[str, Tensor], float]:
    """The orthonormal vectors nearest to given ones, M^(−1/2) V with M their Gram, and the largest entry of M − I.

    Raises:
        ValueError: If they are not nearly orthonormal: an entry of M − I is beyond 1/2, or is not finite.

    Source: Löwdin, "On the non-orthogonality problem", Journal of Chemical Physics 1950.
    """
    gram = inner(vectors, vectors)
    error = departure(gram)
    if not error <= 0.5:
        raise ValueError(
            f"the vectors depart from orthonormality by {error:.1e}: eigenvectors of the Gram and gradients do not "
            "belong together; compute the Grams again, of these parameters, this batch and this loss"
        )
    values, vecs = torch.linalg.eigh(gram)
    return combined(vecs / values.sqrt() @ vecs.mT, vectors), error


def check_orthonormal(vectors: Params, *, what: str) -> None:
    """Raise a ValueError where vectors are not orthonormal to the square root of their precision."""
    sizes = {name: v.shape[0] if v.ndim else 0 for name, v in vectors.items()}
    if len(set(sizes.values())) != 1 or not all(sizes.values()):
        raise ValueError(f"{what}: expected {{name: (k, *shape)}} with one k >= 1 for all, got k={sizes}")
    error = departure(inner(vectors, vectors))
    allowed = max(torch.finfo(v.dtype).eps for v in vectors.values()) ** 0.5
    if not error <= allowed:
        raise ValueError(
            f"{what} expected orthonormal vectors, and an entry of VᵀV − I is {error:.1e}, beyond {allowed:.1e}; "
            "use those of ff.directions.eigenvectors, or orthonormalise yours"
        )


def departure(gram: Float[Tensor, "k k"]) -> float:
    """The largest entry of M − I in size; NaN where one is."""
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def _size(vectors: Params) -> int:
    return len(next(iter(vectors.values())))
