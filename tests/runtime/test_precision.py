"""Products of float32 are in float32, whatever the surroundings allow, and what these allow is left as it was."""

from threading import Event, Thread
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fisherfunc as ff
from fisherfunc.runtime.precision import full_precision, named

CUDNN = torch.backends.cudnn
EXACT = (["ieee"] * len(named()), "highest", False)


def everything():
    by_kind = [setting.fp32_precision for setting in named()]
    return by_kind, told(torch.get_float32_matmul_precision), told(lambda: CUDNN.allow_tf32)


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
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    CUDNN.conv.fp32_precision = "ieee"


def for_everything():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture(params=[by_default, coarse_products, by_both_interfaces, for_everything])
def start(request):
    before = [setting.fp32_precision for setting in named()], torch.backends.fp32_precision
    request.param()
    yield request.param
    torch.backends.fp32_precision = before[1]
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for setting, value in zip(named(), before[0], strict=True):
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


def test_what_is_set_for_everything_still_reaches_each_kind_afterwards(start):
    with full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    if start is for_everything:
        assert torch.backends.mkldnn.conv.fp32_precision == "ieee"


def test_of_two_threads_the_last_to_leave_puts_the_settings_back(start):
    before, entered, leave = everything(), Event(), Event()

    def other():
        with full_precision():
            entered.set()
            assert leave.wait(10)

    thread = Thread(target=other)
    with full_precision():
        thread.start()
        assert entered.wait(10)
    assert everything() == EXACT
    leave.set()
    thread.join()
    assert everything() == before


def test_it_works_where_settings_are_frozen(monkeypatch):
    flags = torch.backends.disable_global_flags.__globals__  # nothing undoes that call
    monkeypatch.setitem(flags, "__allow_nonbracketed_mutation_flag", False)
    with pytest.raises(RuntimeError):
        CUDNN.enabled = False
    model = nn.RNN(2, 3, batch_first=True)
    loss = ff.losses.custom(lambda output, batch: output[0].square().sum(-1), name="states")
    fn = ff.functionalize(model)
    assert len(ff.token_grams(fn, fn.params, (torch.randn(1, 3, 2), torch.zeros(1, 3)), loss).tokens.loss) == 3


class Tells(nn.Linear):
    """A layer that keeps what its surroundings were."""

    seen: ClassVar[list] = []

    def forward(self, x):
        self.seen.append(everything())
        return super().forward(x)


def token_grams(model, fn, batch, loss, grams):
    return ff.token_grams(fn, fn.params, batch, loss)


def per_token_gradients(model, fn, batch, loss, grams):
    return ff.per_token_gradients(fn, fn.params, batch, loss)


def fisher_spectrum(model, fn, batch, loss, grams):
    return ff.fisher_spectrum(model, batch)


def fisher_eigenvectors(model, fn, batch, loss, grams):
    return ff.fisher_eigenvectors(model, batch)


def plan(model, fn, batch, loss, grams):
    return ff.plan(model, batch)


def eigenvectors(model, fn, batch, loss, grams):
    return ff.directions.eigenvectors(fn, fn.params, batch, loss, grams)


def product(model, fn, batch, loss, grams):
    return ff.directions.fisher_vector_product(fn, fn.params, batch, loss)(fn.params)


def damped_inverse(model, fn, batch, loss, grams):
    return ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=0.1)(fn.params)


ENTRY_POINTS = (token_grams, per_token_gradients, fisher_spectrum, fisher_eigenvectors, plan, eigenvectors, product)


@pytest.fixture
def setting():
    model, batch = Tells(2, 2), (torch.randn(3, 2), torch.tensor([0, 1, 0]))
    fn, loss = ff.functionalize(model), ff.losses.classification()
    return model, fn, batch, loss, ff.token_grams(fn, fn.params, batch, loss)


@pytest.fixture
def coarse():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("run", [*ENTRY_POINTS, damped_inverse])
def test_the_model_runs_in_full_precision(run, setting, coarse):
    Tells.seen.clear()
    run(*setting)
    assert Tells.seen and all(seen == EXACT for seen in Tells.seen)
    assert torch.get_float32_matmul_precision() == "medium"


def test_kernels_of_gradients_at_hand_run_in_full_precision(coarse):
    seen = []

    def kernel(rows, **_):
        seen.append(everything())
        return ff.kernels.svd()(rows)

    ff.spectrum_of_gradients({"w": torch.randn(3, 4)}, kernel=kernel)
    assert seen == [EXACT]


@pytest.mark.parametrize("run", [*ENTRY_POINTS, damped_inverse])
def test_the_default_device_does_not_matter(run, setting):
    with torch.device("meta"):  # what lands there has no values
        found = run(*setting)
    tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    assert (tensors or run is plan) and not any(tensor.is_meta for tensor in tensors)
