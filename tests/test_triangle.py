"""Symmetric products by tiles, and a product that the Grams of two parameters have in common, made once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import gradient_rows, gram_errors
from torch import nn
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.gradients.factored import contract
from fisherfunc.linalg import triangle
from fisherfunc.linalg.factors import PointFactors


@given(rows=st.integers(1, 9), left=st.integers(1, 4), right=st.integers(1, 4), seed=st.integers(0, 1000))
def test_tiles_sum_to_the_products(rows, left, right, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (left, right)]
    points = PointFactors(left=normal[0], right=normal[1])
    begin = torch.arange(rows, dtype=torch.float64)
    begin = begin[:, None] + begin  # what is there is added to
    of_left, of_right = points.left @ points.left.mT, points.right @ points.right.mT
    alone, both, beside, formed = (begin.clone() for _ in range(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triangle, "ROWS", 3)
        patch.setattr(triangle, "TILE", 2)
        triangle.add_points(alone, torch.arange(rows), points)
        triangle.add_points(both, torch.arange(rows), points, left_gram=beside)
        triangle.add_rows(formed, points.left)
    for found, product in ((alone, of_left * of_right), (both, of_left * of_right), (beside, of_left)):
        assert_close(found, begin + product, atol=1e-12, rtol=0)
    assert_close(formed, begin + of_left, atol=1e-12, rtol=0)


class Biased(nn.Module):
    """Two linear maps; beside the bias of the first another one like it, or half of one."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(40, 30), nn.Linear(30, 3)
        self.more = nn.Parameter(torch.randn(30)) if variant != "plain" else None
        self.factor = 0.5 if variant == "halved" else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(torch.tanh(y if self.more is None else y + self.factor * self.more))


@pytest.mark.parametrize(("variant", "own_products"), [("plain", 0), ("twice", 1), ("halved", 1)])
@pytest.mark.parametrize("blocks", [None, ff.by_layer])
def test_a_bias_takes_the_product_of_its_weight(variant, own_products, blocks, monkeypatch):
    """Its rows are the weight's output cotangents; a second bias like it, and rows of half the size, have their own."""
    made = []

    def counted(gram: torch.Tensor, rows: torch.Tensor) -> None:
        made.append(len(gram))
        triangle.add_rows(gram, rows)

    monkeypatch.setattr(contract, "add_rows", counted)
    model = Biased(variant).double()
    batch = (torch.randn(20, 40, dtype=torch.float64), torch.arange(20) % 3)
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, batch, ff.losses.classification(), blocks=blocks)
    assert made.count(20) == own_products
    rows = gradient_rows(model, "classification", batch)
    if blocks is None:
        assert max(gram_errors(grams.grams, rows, 1e-12).values()) < 1e-9
    else:
        whole = torch.cat(list(rows.values()), dim=1)
        assert_close(grams.block(), whole @ whole.mT, atol=1e-9, rtol=1e-9)
