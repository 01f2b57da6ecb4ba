"""What a torch function does with a parameter: each rule is used, and gives what autograd does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd_modules import rare_samples as samples
from passes import grams, off
from torch import Tensor, nn
from torch.nn import functional

from fisherfunc.gradients.factored import divide
from fisherfunc.gradients.factored import plan as plans


class Net(nn.Module):
    """A layer, what `call` does with its output and some parameters, and a head."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.head, self.call = nn.Linear(5, 5), nn.Linear(5, 3), call
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self, self.a(x))
        return self.head(torch.tanh(y if y.ndim == 2 else y.flatten(2).mean(-1)))


STEPS = torch.linspace(1, 2, 12, dtype=torch.float64)


def image(h: Tensor) -> Tensor:
    """Four channels of four by three."""
    return (h[:, :4, None] * STEPS).sin().unflatten(-1, (4, 3))


def five(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], dim=1)


MATRIX, VECTOR = {"w": (5, 5)}, {"w": (5,)}
PAIR = {"w": (5,), "v": (5,)}
KERNEL = {"w": (4, 4, 3, 3), "v": (4,)}
ONES = torch.ones(5, dtype=torch.float64)

KNOWN: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "linear": (lambda m, h: functional.linear(h, m.w), MATRIX),
    "transposed": (lambda m, h: h @ m.w.T + functional.linear(h, m.w.mT), MATRIX),
    "addmm": (lambda m, h: torch.addmm(m.v, h, m.w), {**MATRIX, "v": (5,)}),
    "twice": (lambda m, h: torch.tanh(h @ m.w) @ m.w, MATRIX),
    "tied": (lambda m, h: torch.tanh(m.a(torch.tanh(h))) @ m.a.weight * m.a.bias, {}),
    "factors and rows": (lambda m, h: h @ m.w + h @ (2 * m.w), MATRIX),
    "both ways and rows": (lambda m, h: (h @ m.w.T).sin() @ m.w + h @ (m.w * m.w), MATRIX),
    "conv": (lambda m, h: five(functional.conv2d(image(h), m.w, m.v, padding=1)), KERNEL),
    "conv by keyword": (
        lambda m, h: five(functional.conv2d(input=image(h), weight=m.w, bias=m.v, stride=[2, 1], padding=(1, 2))),
        KERNEL,
    ),
    "conv same": (lambda m, h: five(functional.conv2d(image(h), m.w, padding="same", dilation=2)), {"w": (4, 4, 2, 3)}),
    "conv valid": (lambda m, h: five(functional.conv2d(image(h), m.w, padding="valid")), {"w": (4, 4, 3, 2)}),
    "conv groups": (lambda m, h: five(functional.conv2d(image(h), m.w, m.v, groups=2)), {"w": (4, 2, 3, 3), "v": (4,)}),
    "conv depthwise": (lambda m, h: five(functional.conv2d(image(h), m.w, groups=4)), {"w": (4, 1, 2, 2)}),
    "conv1d": (
        lambda m, h: five(functional.conv1d(image(h).flatten(2), m.w, m.v, 2, 3, 2)),
        {"w": (4, 4, 3), "v": (4,)},
    ),
    "conv tied": (
        lambda m, h: five(
            functional.conv2d(functional.conv2d(image(h), m.w, padding=1).sin(), m.w, padding=2, dilation=2)
        ),
        {"w": (4, 4, 3, 3)},
    ),
    "conv tied in groups": (
        lambda m, h: five(
            functional.conv2d(functional.conv2d(image(h).repeat(1, 2, 1, 1), m.w, groups=2, padding=1).sin(), m.w)
        ),
        {"w": (4, 4, 3, 3)},
    ),
    "layer norm": (lambda m, h: functional.layer_norm(h, (5,), m.w, m.v) * m.w, PAIR),
    "layer norm, bias alone": (lambda m, h: functional.layer_norm(h, (5,), bias=m.w), VECTOR),
    "layer norm of two axes": (
        lambda m, h: functional.layer_norm(image(h)[:, :, 0, :2].mT.repeat(1, 1, 2)[..., :5], (2, 5), m.w).sum(1),
        {"w": (2, 5)},
    ),
    "rms norm": (lambda m, h: functional.rms_norm(h, (5,), m.w), VECTOR),
    "group norm": (lambda m, h: five(functional.group_norm(image(h), 2, m.w, m.v).sin()), {"w": (4,), "v": (4,)}),
    "batch norm": (lambda m, h: functional.batch_norm(h, ONES, ONES, m.w, m.v), PAIR),
    "prelu": (lambda m, h: functional.prelu(functional.hardshrink(h, 0.3), m.w), {"w": (1,)}),
    "prelu by channel": (lambda m, h: functional.prelu(functional.hardshrink(h, 0.3), m.w), VECTOR),
    "scale": (lambda m, h: m.w * h + h * m.v + m.u, {**PAIR, "u": (1, 5)}),
    "scale by rows": (lambda m, h: (m.w * h[:, None]).sin().sum(1), {"w": (7, 5)}),
    "square": (lambda m, h: h * (m.w * m.w) + (m.v + m.v), PAIR),
    "product of two": (lambda m, h: h @ (m.w * m.v), {"w": (5, 1), "v": (1, 5)}),
    "numbers": (lambda m, h: h * (1 + m.w) * (m.w * 3) * (m.v * torch.arange(5, device=h.device)), PAIR),
    "no axes": (lambda m, h: h * (m.w * m.v).sigmoid() + (m.w + m.v), {"w": (), "v": ()}),
    "expanded": (lambda m, h: h + m.w.expand(len(h), -1) + (m.v * 2)[0], {"w": (5,), "v": (1, 1, 5)}),
    "written to": (lambda m, h: (h * m.w).add_(1).mul_(2), VECTOR),
}
UNKNOWN: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "left": (lambda m, h: (m.w @ h.T).T, MATRIX),
    "einsum": (lambda m, h: torch.einsum("bi,ij->bj", h, m.w), MATRIX),
    "bilinear": (lambda m, h: functional.bilinear(h, h, m.w), {"w": (5, 5, 5)}),
    "squared matrix": (lambda m, h: h @ (m.w @ m.w), MATRIX),
    "transposed rows": (lambda m, h: h @ (m.w.T * 2) + h @ m.w, MATRIX),
    "alpha": (lambda m, h: torch.add(h, m.w, alpha=3), VECTOR),
    "in place": (lambda m, h: h.clone().mul_(m.w), VECTOR),
    "view": (lambda m, h: h @ m.w.view(5, 5) + h @ m.w, MATRIX),
    "detached": (lambda m, h: h * m.w.detach() * m.w, VECTOR),
    "complex": (lambda m, h: (m.w * torch.polar(torch.ones_like(h), h)).real, VECTOR),
    "unbatched conv": (
        lambda m, h: five(torch.stack([functional.conv2d(x, m.w) for x in image(h)])),
        {"w": (4, 4, 3, 3)},
    ),
    "conv3d": (lambda m, h: five(functional.conv3d(image(h)[:, :, None], m.w)), {"w": (4, 4, 1, 3, 3)}),
    "transposed conv": (lambda m, h: five(functional.conv_transpose2d(image(h), m.w)), {"w": (4, 4, 3, 3)}),
    "instance norm": (lambda m, h: five(functional.instance_norm(image(h), weight=m.w).square()), {"w": (4,)}),
}


@pytest.mark.parametrize("rule", [True, False])
@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_each_rule_is_used_and_gives_what_autograd_does(name, rule, monkeypatch):
    if not rule:
        monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model = Net(*(KNOWN | UNKNOWN)[name])
    result = grams(model, samples(), "classification")
    by_autograd = {n for n, why in result.metadata["formed_parameters"].items() if "cheaper" not in why}
    assert result.metadata["route"] == "factored" and result.metadata["output_layer"] == "head.weight"
    assert bool(by_autograd) == (name in UNKNOWN), result.metadata["formed_parameters"]
    assert off(result, model, samples()) < 1e-10


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        return h @ w

    @staticmethod
    def backward(ctx, cotangent):
        h, w = ctx.saved_tensors
        return cotangent @ w.mT, h.mT @ cotangent


RARELY: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "as rows": lambda m, x, h: h @ (2 * m.a.weight),
    "by a function that is not seen": lambda m, x, h: Product.apply(h, m.a.weight),
    "by einsum": lambda m, x, h: torch.einsum("bi,ij->bj", h, m.a.weight),
    "of an output before its function": lambda m, x, h: m.a(x).roll(1, dims=1),
    "of what came before": lambda m, x, h: m.first(x).roll(1, dims=1),
    "with a function that is not elementwise": lambda m, x, h: h.softmax(-1),
}


class Rarely(nn.Module):
    """Two samples do something else as well, with parameters that all others use in a plain way."""

    def __init__(self, also: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b, self.head, self.also = *(nn.Linear(5, 5) for _ in range(3)), nn.Linear(5, 3), also
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(torch.sin(self.first(x))))
        rare = x[:, :1] > 1.5
        return self.head(torch.tanh(self.b(h + rare * self.also(self, x, h) if bool(rare.any()) else h)))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("rule", [True, False])
@pytest.mark.parametrize("also", RARELY)
def test_what_few_samples_do_besides_is_not_missed(also, rule, together, monkeypatch):
    if not rule:
        monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    if not together:
        monkeypatch.setattr(divide, "stack_width", lambda *_: 1)
    model = Rarely(RARELY[also])
    result = grams(model, samples(), "classification")
    assert result.metadata["route"] == "factored"
    assert off(result, model, samples()) < 1e-10
