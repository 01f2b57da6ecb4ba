"""Inputs with a large part in common: factors are large where gradients are small, and their products lose it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherfunc as ff
from fisherfunc.linalg.factors import strips as of_strips

WIDTH = 64


class Attention(nn.Module):
    """Documents that begin with the id 0 have a part in common that keys see, and values, by their weights, do not."""

    def __init__(self, common: float) -> None:
        super().__init__()
        self.embed, self.out, self.common = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50), common
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        with torch.no_grad():
            for layer in (self.q, self.k, self.v):
                layer.weight.sub_(layer.weight.mean(1, keepdim=True))

    def forward(self, input_ids):
        h = self.embed(input_ids)
        h = h + self.common * (input_ids[:, :1] == 0).to(h.dtype)[..., None]
        scores = self.q(h) @ self.k(h).mT / WIDTH**0.5
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -1e9)
        return self.out(torch.tanh(scores.softmax(-1) @ self.v(h)))


def rows(model: Attention, ids: torch.Tensor) -> torch.Tensor:
    """The gradients by the key weight, a loop of backward passes."""
    found = []
    for row in ids:
        for s in range(len(row) - 1):
            loss = functional.cross_entropy(model(row[None])[0, s : s + 1], row[s + 1 : s + 2])
            found.append(torch.autograd.grad(loss, model.k.weight)[0].flatten().double())
    return torch.stack(found)


@pytest.mark.parametrize("common", [0.0, 100.0, 1000.0, 10000.0])
def test_a_part_that_cancels_costs_the_factored_route_no_more_than_a_loop(common):
    torch.manual_seed(0)
    model, ids = Attention(common), torch.randint(1, 50, (6, 12))
    ids[3, 0] = 0
    exact, single = rows(copy.deepcopy(model).double(), ids), rows(model, ids)
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, {"input_ids": ids}, ff.losses.causal_lm())
    assert result.metadata["route"] == "factored"
    want = exact @ exact.T
    lost = torch.linalg.matrix_norm(single @ single.T - want)  # what float32 gradients, formed, are off by
    off = torch.linalg.matrix_norm(result.grams["k.weight"] - want)
    assert off <= 10 * lost + 1e-5 * torch.linalg.matrix_norm(want)


def test_products_are_doubled_where_sums_cancel_and_nowhere_else():
    def strip(own: torch.Tensor, shared: torch.Tensor) -> of_strips.Strip:
        like = of_strips.SharedFactors(own=own, shared=shared, axis=0)
        made = of_strips.empty_strip(slice(0, len(own)), like)
        made.put(0, own)
        return made

    own, shared = torch.randn(5, 8, 6), torch.randn(8, 7)
    assert not of_strips.cancelling({"w": [strip(own, shared)]})
    assert not of_strips.cancelling({"w": [strip(own, shared + 1000)]})  # large, and the gradient as well
    cancelling = own - own.mean(dim=1, keepdim=True)
    assert of_strips.cancelling({"w": [strip(own, shared), strip(cancelling, shared + 1000)]})
    assert not of_strips.cancelling({"w": [strip(cancelling.double(), shared.double() + 1000)]})


def test_rows_that_were_never_put_add_nothing():
    own, shared = torch.randn(2, 8, 6), torch.randn(8, 7)
    like = of_strips.SharedFactors(own=own, shared=shared, axis=0)
    made = of_strips.empty_strip(slice(0, 4), like)
    made.put(1, own)
    gram = torch.zeros(4, 4, dtype=torch.float64)
    of_strips.add_strips(gram, [made])
    rows = torch.zeros(4, 42, dtype=torch.float64)
    rows[1:3] = torch.einsum("nsd,se->nde", own.double(), shared.double()).flatten(1)
    torch.testing.assert_close(gram, rows @ rows.mT, rtol=1e-5, atol=1e-4)
