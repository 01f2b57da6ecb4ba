"""Symmetric products by tiles, and a product that the Grams of two parameters have in common, made once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import gradient_rows, gram_errors
from torch import nn
from torch.testing import assert_close
from zoo import CASES, build

import fisherfunc as ff
from fisherfunc.gradients.factors import contract
from fisherfunc.linalg.factors import triangle
from fisherfunc.linalg.factors.factors import PointFactors
from fisherfunc.linalg.factors.triangle import Term, add_points
from fisherfunc.runtime.grain import CPU, divided_as


@given(rows=st.integers(1, 9), left=st.integers(1, 4), right=st.integers(1, 4), seed=st.integers(0, 1000))
def test_tiles_sum_to_the_products(rows, left, right, seed):
    generator = torch.Generator().manual_seed(seed)
    own, shared, other = (
        torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (left, right, right)
    )
    index = torch.randint(2, (rows,), generator=generator).cumsum(0).clamp(max=rows - 1)  # some rows share an input
    points = PointFactors(own=own, shared=shared, axis=0)
    indexed = PointFactors(own=own, shared=other, axis=0, index=index)
    begin = torch.arange(rows, dtype=torch.float64)
    begin = begin[:, None] + begin  # what is there is added to
    of_own, of_points = own @ own.mT, (own @ own.mT) * (shared @ shared.mT)
    of_indexed = (own @ own.mT) * (other[index] @ other[index].mT)
    alone, beside, both, formed = (begin.clone() for _ in range(4))
    fresh, fresh_beside, fresh_both = (torch.full_like(begin, torch.nan) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch, divided_as(replace(CPU, rows=3)):
        patch.setattr(triangle, "TILE", 2)
        add_points([])
        add_points([Term(points=points, gram=alone, own_gram=beside)])
        add_points([Term(points=points, gram=both), Term(points=indexed, gram=both, own_gram=both)])
        terms = [Term(points=indexed, gram=fresh, own_gram=fresh_beside)]
        terms += [Term(points=one, gram=fresh_both, own_gram=fresh_both) for one in (points, indexed)]
        add_points(terms, new=[fresh, fresh_beside, fresh_both])
        triangle.add_rows(formed, own)
    expected = [
        (alone, begin + of_points),
        (beside, begin + of_own),
        (both, begin + of_points + of_indexed + of_own),
        (formed, begin + of_own),
        (fresh, of_indexed),
        (fresh_beside, of_own),
        (fresh_both, of_points + of_indexed + 2 * of_own),
    ]
    for found, product in expected:
        assert_close(found, product, atol=1e-12, rtol=0)


class Biased(nn.Module):
    """Two linear maps; to the outputs of the first another bias is added, or a multiple of one."""

    def __init__(self, *, bias: bool, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.added = nn.Parameter(torch.randn(30))  # its name comes before that of the weight
        self.first, self.second = nn.Linear(40, 30, bias=bias), nn.Linear(30, 3)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x) + self.factor * self.added))


@pytest.mark.parametrize(("bias", "factor", "own_products"), [(False, 1.0, 0), (True, 1.0, 1), (False, 0.5, 1)])
@pytest.mark.parametrize("blocks", [None, ff.by_layer])
def test_a_bias_takes_the_product_of_its_weight(bias, factor, own_products, blocks, monkeypatch):
    """Its rows are the weight's output cotangents; a second bias, or one whose rows are half of these, has its own."""
    made = []

    def counted(gram: torch.Tensor, rows: torch.Tensor) -> None:
        made.append(len(gram))
        triangle.add_rows(gram, rows)

    monkeypatch.setattr(contract, "add_rows", counted)
    model = Biased(bias=bias, factor=factor).double()
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


@pytest.fixture
def memory_of_nan():
    """What is allocated and not written to is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.parametrize("blocks", [None, ff.by_layer, ff.by_module, ff.whole])
@pytest.mark.parametrize("kind", ["linear maps", "cnn", "gpt2"])
def test_no_gram_has_anything_in_it_that_was_not_put_there(kind, blocks, memory_of_nan):
    if kind == "linear maps":
        model, loss = Biased(bias=True, factor=1.0).double(), "classification"
        batch = (torch.randn(9, 40, dtype=torch.float64), torch.arange(9) % 3)
    else:
        (model, batch), loss = build(kind, dtype=torch.float64), CASES[kind].kind
    fn = ff.functionalize(model)
    found = ff.token_grams(fn, fn.params, batch, getattr(ff.losses, loss)(), blocks=blocks).grams
    rows = gradient_rows(model, loss, batch)
    labels = {name: (name,) for name in rows} if blocks is None else ff.partition(list(rows), blocks)
    expected = {label: torch.cat([rows[name] for name in names], dim=1) for label, names in labels.items()}
    assert max(gram_errors(found, expected, floor=1e-16).values()) < 1e-9
