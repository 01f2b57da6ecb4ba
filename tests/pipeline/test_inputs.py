"""Inputs reach a model as they were given where it takes them so, and in its dtype where it does not."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherfunc as ff

COARSE = (torch.bfloat16, torch.float16)
FEW = {torch.bfloat16: 257, torch.float16: 2049}
"""The first integer that a dtype has no number for."""


class Timed(nn.Module):
    """A time step in float32 gives its parity; activations are in the dtype of the weights, which inputs may have."""

    def __init__(self, dtype, casts):
        super().__init__()
        self.layer, self.casts = nn.Linear(4, 3, dtype=dtype), casts
        self.seen = []

    def forward(self, x, step):
        odd = (step % 2 == 1)[:, None]
        return self.layer(x.to(self.layer.weight.dtype) if self.casts else x) * torch.where(odd, 1.0, 0.5)


def spectrum(model, batch, loss=None, **options):
    return ff.fisher_spectrum(model, batch, loss=loss, blocks=ff.whole, **options).full.eigenvalues


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("casts", [True, False])
def test_a_time_step_that_the_model_takes_keeps_its_dtype(dtype, casts):
    torch.manual_seed(0)
    model, steps = Timed(dtype, casts), torch.tensor([1, 2, 0, 3]) + FEW[dtype] - 1
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    x = x if casts else x.to(dtype)
    integers = spectrum(model, (x, steps, y))
    torch.testing.assert_close(spectrum(model, (x, steps.float(), y)), integers, rtol=0, atol=0)
    assert not torch.allclose(spectrum(model, (x, steps.to(dtype), y)), integers, rtol=1e-2)


@pytest.mark.parametrize("given", [torch.float64, torch.float16])
def test_inputs_that_the_model_does_not_take_are_cast(given):
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4).half(), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(spectrum(model, (x.to(given), y)), spectrum(model, (x.float(), y)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", COARSE)
def test_classes_in_floats_stay_the_same_classes(dtype):
    torch.manual_seed(0)
    model, x = nn.Linear(4, FEW[dtype] + 1, dtype=dtype), torch.randn(2, 4)
    y = torch.tensor([FEW[dtype], 0])
    loss = ff.losses.classification()
    torch.testing.assert_close(spectrum(model, (x, y.float()), loss), spectrum(model, (x, y), loss), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("loss", [ff.losses.regression, ff.losses.position_regression])
def test_residuals_of_large_targets_are_taken_in_float32(dtype, loss):
    """∇ of a bias by ½ (f − y)² is f − y: f is zero, and so λ is the sum of y², which has no number in float16."""

    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

        def forward(self, x):
            return x[:, :1] * 0 + self.bias

    y = torch.tensor([[FEW[dtype] + 0.25]])
    values = loss().values(torch.zeros(1, 1, dtype=dtype), (y, y))
    torch.testing.assert_close(values, functional.mse_loss(torch.zeros(1, 1), y, reduction="none") / 2, rtol=0, atol=0)
    (largest,) = spectrum(Offset(), (torch.zeros(1, 4, dtype=dtype), y), loss(), dtype=dtype).tolist()
    assert largest == pytest.approx(float(y) ** 2, rel=2 * torch.finfo(dtype).eps)
