"""Models that differentiate inside their forward pass by torch.func run on both routes, and can be planned."""

import pytest
import torch
from oracle import gram_errors
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.survey.prepare import ROUTES


class Slope(nn.Module):
    """The derivative of a network by its input, and the value beside it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.head, self.how = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Linear(2, 1), how

    def forward(self, x):
        return self.head(torch.cat([self.slope(x), self.net(x)], dim=1))

    def slope(self, x):
        if self.how == "jvp":
            return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]
        if self.how == "vjp":
            output, pull = torch.func.vjp(self.net, x)
            return pull(torch.ones_like(output))[0]
        if self.how == "grad":
            return torch.func.vmap(torch.func.grad(lambda t: self.net(t).sum()))(x)
        return torch.func.vmap(getattr(torch.func, self.how)(self.net))(x).reshape(len(x), 1)


HOWS = ("jacrev", "jacfwd", "grad", "vjp", "jvp", "hessian")


def explicit_rows(model: Slope, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """A loop of backward passes through the derivative written out: w₂ (1 − tanh²) w₁, or its derivative."""
    first, last = model.net[0], model.net[2]
    rows: dict[str, list[torch.Tensor]] = {}
    for a, b in zip(x, y, strict=True):
        t = torch.tanh(first(a))
        curve = -2 * t * (1 - t**2) * first.weight[:, 0] ** 2 if model.how == "hessian" else None
        slope = (1 - t**2) * first.weight[:, 0] if curve is None else curve
        output = model.head(torch.stack([last.weight[0] @ slope, last(t)[0]]))
        found = torch.autograd.grad((output - b).square().sum() / 2, list(model.parameters()))
        for name, g in zip(dict(model.named_parameters()), found, strict=True):
            rows.setdefault(name, []).append(g.flatten())
    return {name: torch.stack(r) for name, r in rows.items()}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("how", HOWS)
def test_a_derivative_inside_the_forward_pass_is_differentiated(how, route):
    model = Slope(how).double()
    x, y = torch.rand(5, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    fn = ff.functionalize(model)
    got = ff.token_grams(fn, fn.params, (x, y), ff.losses.regression(), route=route, memory_limit=10**8)
    errors = gram_errors(got.grams, explicit_rows(model, x, y), floor=1e-15)
    assert max(errors.values()) < 1e-10, errors
    assert got.metadata["route"] == route


@pytest.mark.parametrize("how", HOWS)
def test_it_can_be_planned(how):
    model = Slope(how)
    found = ff.plan(model, (torch.rand(5, 1), torch.randn(5, 1)), calibrate=False)
    assert found.num_units == 5
