"""Products of float32 are in float32, whatever the surroundings allow, and what these allow is left as it was."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import fisherfunc as ff
from fisherfunc.linalg.full_precision import full_precision

CUDNN, CPU, PRODUCTS = torch.backends.cudnn, torch.backends.mkldnn, torch.backends.cuda.matmul
NAMED = [PRODUCTS, CUDNN.conv, CUDNN.rnn, CPU.matmul, CPU.conv, CPU.rnn]
EXACT = (["ieee"] * len(NAMED), "highest", False)


def everything():
    return [setting.fp32_precision for setting in NAMED], told(torch.get_float32_matmul_precision), told(convolutions)


def convolutions():
    return CUDNN.allow_tf32


def told(setting):
    try:
        return setting()
    except RuntimeError:
        return "torch does not tell"


def by_default():
    pass


def coarse_products():
    torch.set_float32_matmul_precision("medium")


def by_both_interfaces():
    PRODUCTS.fp32_precision = "tf32"
    CUDNN.conv.fp32_precision = "ieee"


def for_everything():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture(params=[by_default, coarse_products, by_both_interfaces, for_everything])
def start(request):
    before = [setting.fp32_precision for setting in NAMED], torch.backends.fp32_precision
    request.param()
    yield
    torch.backends.fp32_precision = before[1]
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for setting, value in zip(NAMED, before[0], strict=True):
        setting.fp32_precision = value


@pytest.mark.parametrize("failing", [False, True])
def test_all_settings_are_exact_inside_and_put_back(start, failing):
    before = everything()
    try:
        with full_precision():
            assert everything() == EXACT
            with full_precision():
                pass
            assert everything() == EXACT
            if failing:
                raise KeyError("inside")
    except KeyError:
        assert failing
    assert everything() == before


class Tells(nn.Linear):
    """A layer that keeps what its surroundings were."""

    seen: ClassVar[list] = []

    def forward(self, x):
        self.seen.append(everything())
        return super().forward(x)


def entry_points():
    loss, batch = ff.losses.classification(), (torch.randn(3, 2), torch.tensor([0, 1, 0]))
    fn = ff.functionalize(Tells(2, 2))
    grams = ff.token_grams(fn, fn.params, batch, loss)
    x = {name: torch.ones_like(p) for name, p in fn.params.items()}
    product = ff.directions.fisher_vector_product(fn, fn.params, batch, loss)
    model = Tells(2, 2)
    return {
        "token_grams": lambda: ff.token_grams(fn, fn.params, batch, loss),
        "per_token_gradients": lambda: ff.per_token_gradients(fn, fn.params, batch, loss),
        "fisher_spectrum": lambda: ff.fisher_spectrum(model, batch),
        "fisher_eigenvectors": lambda: ff.fisher_eigenvectors(model, batch),
        "plan": lambda: ff.plan(model, batch),
        "eigenvectors": lambda: ff.directions.eigenvectors(fn, fn.params, batch, loss, grams),
        "product": lambda: product(x),
        "making a product": lambda: ff.directions.fisher_vector_product(fn, fn.params, batch, loss),
        "damped_inverse": lambda: ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=0.1)(x),
    }


@pytest.mark.parametrize("name", entry_points())
def test_the_model_runs_in_full_precision(name):
    run = entry_points()[name]
    torch.set_float32_matmul_precision("medium")
    try:
        Tells.seen.clear()
        run()
        assert Tells.seen and all(seen == EXACT for seen in Tells.seen)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
