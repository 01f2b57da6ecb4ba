"""Strategies of gradient matrices, of gradients by parameter, and of partitions. Axis order: `(n, p)`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from fisherfunc.testing.matrices import gaussian, matrix

PARAMETER_NAMES = (
    "weight",
    "embed.weight",
    "layers.0.attn.q_proj.weight",
    "layers.0.mlp.up_proj.weight",
    "layers.1.attn.q_proj.weight",
    "layers.1.norm.weight",
    "lm_head.bias",
)


def gradient_matrices(
    *, max_rows: int = 8, max_columns: int = 12, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[Tensor]:
    """Gradient matrices `(n, p)`, n and p from 1: `matrices.KINDS` says of which kinds.

    Args:
        max_rows: The largest n.
        max_columns: The largest p.
        dtype: That of the matrix.

    Example:
        >>> from hypothesis import find
        >>> find(gradient_matrices(), lambda rows: not rows.any()).shape
        torch.Size([1, 1])
    """

    @st.composite
    def matrices(draw: st.DrawFn) -> Tensor:
        num_rows, num_columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
        return matrix(draw, num_rows, num_columns).to(dtype)

    return matrices()


def prescribed_spectra(
    *, max_rows: int = 8, max_columns: int = 12, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Pairs of G = √N U diag(√λ) Vᵀ and λ, the min(N, P) eigenvalues of F, largest first.

    Args:
        max_rows: The largest N.
        max_columns: The largest P.
        dtype: That of G, which is rounded to it; λ are float64.
    """
    eigenvalue = st.one_of(st.just(0.0), st.floats(-6, 6).map(lambda exponent: 10.0**exponent))

    @st.composite
    def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
        num_rows, num_columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
        rank = min(num_rows, num_columns)
        values = draw(st.lists(eigenvalue, min_size=rank, max_size=rank))
        eigenvalues = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        left = torch.linalg.qr(gaussian(draw, num_rows, rank)).Q
        right = torch.linalg.qr(gaussian(draw, num_columns, rank)).Q
        rows = left * (num_rows * eigenvalues).sqrt() @ right.mT
        return rows.to(dtype), eigenvalues

    return pairs()


def gradient_trees(
    *, max_rows: int = 6, max_tensors: int = 4, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[dict[str, Tensor]]:
    """Per-token gradients `{name: (n, *shape)}` of parameters with none to three axes.

    Args:
        max_rows: The largest n.
        max_tensors: The largest number of parameters, at most that of `PARAMETER_NAMES`.
        dtype: That of the gradients.
    """
    shapes = st.lists(st.integers(1, 3), max_size=3)

    @st.composite
    def trees(draw: st.DrawFn) -> dict[str, Tensor]:
        num_rows = draw(st.integers(1, max_rows))
        names = draw(st.lists(st.sampled_from(PARAMETER_NAMES), min_size=1, max_size=max_tensors, unique=True))
        tree = {}
        for name in names:
            shape = draw(shapes)
            tree[name] = matrix(draw, num_rows, prod(shape)).to(dtype).reshape(num_rows, *shape)
        return tree

    return trees()


@dataclass(frozen=True)
class LabelTable:
    """A block rule with a table in place of a pattern: a parameter's name to its label."""

    labels: Mapping[str, str]

    def __call__(self, name: str) -> str:
        """The label of a parameter."""
        return self.labels[name]


def partitions(names: Iterable[str]) -> st.SearchStrategy[LabelTable]:
    """Rules that put the given parameters into one to all blocks, in any way.

    Args:
        names: The parameters; a mapping counts by its keys.
    """
    names = list(names)
    label = st.integers(0, len(names) - 1).map(lambda index: f"block.{index}")
    return st.fixed_dictionaries(dict.fromkeys(names, label)).map(LabelTable)
