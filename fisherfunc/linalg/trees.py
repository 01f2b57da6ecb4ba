"""Parameter-shaped trees {name: tensor} as vectors of P entries, and stacks of k of them, {name: (k, *shape)}.

The inner product is the sum over all entries of all tensors, accumulated in float64. Axis order `(j, k)`: of the first
stack, of the second.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.gram import TILE
from fisherfunc.records.axes import Params


def inner(one: Params, other: Params) -> Float[Tensor, "j k"]:
    """⟨a_j, b_k⟩ in float64, of two stacks of alike trees. Cost 2 j k P operations."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for name, a in one.items():
        for some, others in zip(_tiles(a), _tiles(other[name]), strict=True):
            total = total.to(a.device) + some.double() @ others.double().mT
    return total


def _tiles(stack: Tensor) -> tuple[Tensor, ...]:
    return stack.reshape(len(stack), -1).split(TILE, dim=1)


def combined(weights: Float[Tensor, "j k"], vectors: Params) -> dict[str, Tensor]:
    """Σ_k w_jk v_k: j combinations of a stack, in its dtype."""
    return {name: torch.tensordot(weights.to(v), v, dims=1) for name, v in vectors.items()}


def stacked(tree: Params) -> dict[str, Tensor]:
    """One tree as a stack of one."""
    return {name: value[None] for name, value in tree.items()}


def check_alike(got: Params, expected: Mapping[str, torch.Size], *, what: str) -> None:
    """Raise where a tree has other names or shapes than expected.

    Args:
        got: The tree.
        expected: The shape of each tensor that it should have.
        what: What an error calls the tree.

    Raises:
        ValueError: It names what is missing, what is unknown, and what has another shape.
    """
    problems = [f"lacks {name!r}" for name in expected if name not in got]
    problems += [f"has {name!r}, which is not expected" for name in got if name not in expected]
    problems += [
        f"has {name!r} of shape {tuple(got[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in got and got[name].shape != shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{what} {', '.join(problems[:4])}{more}; give it the names and shapes of the parameters, and no others"
        )
