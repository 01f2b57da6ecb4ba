"""What torch gets wrong for a batch of one is worked around; the first test fails when torch has mended it."""

import pytest
import torch
from oracle import gram_errors
from torch import nn
from torch.nn import functional

import fisherfunc as ff
from fisherfunc.gradients.survey.prepare import ROUTES


def gradient(x: torch.Tensor) -> torch.Tensor:
    """Of the scale of a normalisation, for the first sample of a batch."""
    torch.manual_seed(0)
    weight, cotangent = torch.rand(4, requires_grad=True), torch.rand(1, 12, 4)
    output = functional.batch_norm(x, torch.rand(4), 0.5 + torch.rand(4), weight, torch.zeros(4))
    return torch.autograd.grad((output.flatten(2).transpose(1, 2)[:1].contiguous() * cotangent).sum(), weight)[0]


def test_torch_itself_is_wrong_for_a_batch_of_one_on_a_cpu():
    """Where this fails, models/calls/batch_of_one.py can go for torch from that version on."""
    x = torch.rand(1, 4, 4, 3)
    alone, beside_another = gradient(x), gradient(torch.cat([x, x]))
    assert (alone - beside_another).norm() > 0.01 * beside_another.norm()


class Written(nn.Module):
    """Normalisation by running statistics, or by those of each sample and channel, written out."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.of = norm.weight, norm.bias, norm.eps, norm

    def forward(self, x):
        shape, axes = (1, -1, *[1] * (x.ndim - 2)), tuple(range(2, x.ndim))
        mean, var = (t if t is None else t.view(shape) for t in (self.of.running_mean, self.of.running_var))
        if mean is None:
            mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
        return (x - mean) / (var + self.eps).sqrt() * self.weight.view(shape) + self.bias.view(shape)


class Patches(nn.Module):
    """The patch embedding of a hybrid vision transformer; `functional` calls the normalisation by torch's function."""

    def __init__(self, norm: nn.Module, conv: type[nn.Module], *, by_function: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.by_function = (
            conv(2, 4, 2, 2, bias=False),
            norm,
            nn.Linear(4, 3),
            by_function,
        )

    def forward(self, x):
        h, norm = self.conv(x), self.norm
        if self.by_function:
            h = 1.0 + torch.batch_norm(
                h, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, norm.eps, False
            )
            h = functional.relu(h)
        else:
            h = functional.relu_(norm(h).add_(1.0))
        return self.head(torch.tanh(h.flatten(2).transpose(1, 2)).mean(1))


CASES = {
    "batch norm": lambda: Patches(nn.BatchNorm2d(4), nn.Conv2d),
    "in three dimensions": lambda: Patches(nn.BatchNorm3d(4), nn.Conv3d),
    "instance norm": lambda: Patches(nn.InstanceNorm2d(4, affine=True), nn.Conv2d),
    "by a function": lambda: Patches(nn.BatchNorm2d(4), nn.Conv2d, by_function=True),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_normalisations_before_tokens_have_right_gradients(make, route):
    model = make().double().eval()
    for p in model.norm.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    if model.norm.running_mean is not None:
        model.norm.running_mean.uniform_(), model.norm.running_var.uniform_(0.5, 1.5)
    axes = 3 if isinstance(model.conv, nn.Conv3d) else 2
    x, y = torch.rand(4, 2, *[6, 4, 4][:axes], dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    fn = ff.functionalize(model)
    got = ff.token_grams(fn, fn.params, (x, y), ff.losses.classification(), route=route)
    assert got.metadata["self_check"]["held"] and got.metadata["route"] == route
    model.norm, model.by_function = Written(model.norm), False
    names = list(fn.params)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for a, b in zip(x, y, strict=True):
        loss = functional.cross_entropy(model(a[None]), b[None])
        parameters = [p for name, p in model.named_parameters() if not name.startswith("norm.of")]
        for name, g in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            rows[name].append(g.flatten())
    errors = gram_errors(got.grams, {name: torch.stack(r) for name, r in rows.items()}, floor=1e-15)
    assert max(errors.values()) < 1e-10, errors
