"""Kinds of gradient matrices `(n, p)`, float64: what a draw of one does."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def matrix(draw: st.DrawFn, num_rows: int, num_columns: int) -> Tensor:
    """A matrix of any kind."""
    return draw(st.sampled_from(KINDS))(draw, num_rows, num_columns)


def _zero(draw: st.DrawFn, num_rows: int, num_columns: int) -> Tensor:
    return torch.zeros(num_rows, num_columns, dtype=torch.float64)


def _constant(draw: st.DrawFn, num_rows: int, num_columns: int) -> Tensor:
    return torch.full((num_rows, num_columns), draw(st.sampled_from((1.0, -3.0, 0.1))), dtype=torch.float64)


def gaussian(draw: st.DrawFn, num_rows: int, num_columns: int) -> Tensor:
    """Independent standard normal entries."""
    return torch.randn(num_rows, num_columns, generator=generator(draw), dtype=torch.float64)


def _rank_deficient(draw: st.DrawFn, num_rows: int, num_columns: int) -> Tensor:
    rank = draw(st.integers(1, max(1, min(num_rows, num_columns) - 1)))
    return gaussian(draw, num_rows, rank) @ gaussian(draw, rank, num_columns)


def _duplicated(draw: st.DrawFn, num_rows: int, num_columns: int) -> Tensor:
    source = draw(st.lists(st.integers(0, num_rows - 1), min_size=num_rows, max_size=num_rows))
    return gaussian(draw, num_rows, num_columns)[source]


def _badly_scaled(draw: st.DrawFn, num_rows: int, num_columns: int) -> Tensor:
    exponents = draw(st.lists(st.integers(-8, 8), min_size=num_rows, max_size=num_rows))
    scales = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    return scales[:, None] * gaussian(draw, num_rows, num_columns)


KINDS = (_zero, _constant, gaussian, _rank_deficient, _duplicated, _badly_scaled)


def generator(draw: st.DrawFn) -> torch.Generator:
    """A generator with a drawn seed."""
    return torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
