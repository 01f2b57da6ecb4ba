"""The resolution that is stated bounds the error: measured in float64 on a few rows, whatever the model loses."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracle import gradient_rows
from torch import nn
from torch.nn import functional
from zoo import CASES, build
from zoo import cast as batch_in

import fisherfunc as ff
from fisherfunc.gradients.checks import certificate
from fisherfunc.gradients.checks.round_off import round_off
from fisherfunc.gradients.factored.route import factored_grams
from fisherfunc.gradients.rows.workload import PassOptions
from fisherfunc.gradients.survey.prepare import prepared
from fisherfunc.linalg.grams.token_grams import TokenGrams

CLASSES = ff.losses.classification()


def samples(count: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, width), torch.arange(count) % 3


def deep(gain: float) -> nn.Module:
    """Fifty layers, through which round-off grows as activations and gradients do."""
    layers = [layer for _ in range(50) for layer in (nn.Linear(16, 16), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(16, 3))
    for parameter in net.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=gain / 4)
    return net


def exact_gram(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loop of backward passes in float64, over the values that the model holds in its own dtype."""
    model, rows = copy.deepcopy(model).double(), []
    for one, target in zip(x.double(), y, strict=True):
        loss = functional.cross_entropy(model(one[None]), target[None])
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows) @ torch.stack(rows).T


def spectra_of(model, batch, **options):
    measured = ff.fisher_spectrum(model, batch, loss=CLASSES, blocks=ff.whole, **options)
    assumed = ff.fisher_spectrum(model, batch, loss=CLASSES, blocks=ff.whole, self_check=False, **options)
    return measured, assumed


IN_BOTH = ("mlp", "cnn", "gpt2", "bert", "shared")  # not every CPU has an LSTM in bfloat16


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in (*IN_BOTH, "lstm")), *((name, torch.bfloat16) for name in IN_BOTH)],
)
def test_where_all_rows_are_measured_the_error_is_known(name, dtype):
    model, batch = build(name, dtype=dtype)
    kind, fn = CASES[name].kind, ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, batch, getattr(ff.losses, kind)())
    assert grams.metadata["round_off"] == {"measured": True, "num_rows": grams.num_rows, "reason": None}
    rows = gradient_rows(copy.deepcopy(model).double(), kind, batch_in(batch, torch.float64))
    for label, gram in grams.grams.items():
        want = rows[label].flatten(1).double() @ rows[label].flatten(1).double().T
        error = float(torch.linalg.matrix_norm(gram.double() - want))
        # What two computations in float64 differ by is a billionth of what float32 loses.
        assert grams.errors[label] == pytest.approx(error, rel=1e-5, abs=1e-9 * float(want.trace())), label


def test_a_deep_network_loses_more_than_its_dtype_says_and_that_is_stated():
    torch.manual_seed(0)
    model, batch = deep(gain=1.5), samples(2)
    full = ff.fisher_spectrum(model, batch, loss=CLASSES, blocks=ff.whole, route="dense").full
    off = (full.eigenvalues - torch.linalg.eigvalsh(exact_gram(model, *batch)).flip(-1) / 2).abs().max()
    assert 2 * torch.finfo(torch.float32).eps * full.eigenvalues[0] < off <= full.resolution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_of_many_rows_eight_show_a_bound_that_is_tighter_than_what_is_assumed(dtype, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).to(dtype)
    x, y = samples(300)
    measured, assumed = spectra_of(model, (x.to(dtype), y), seed=seed)
    assert measured.metadata["round_off"]["num_rows"] == 8
    exact = torch.linalg.eigvalsh(exact_gram(model, x.to(dtype), y)).flip(-1) / len(y)
    off = (measured.full.eigenvalues - exact[: len(measured.full.eigenvalues)]).abs().max()
    # ‖E‖ is some eps tr K, and tr K some λ_max; 300 eps λ_max is what is assumed.
    assert off <= measured.full.resolution < assumed.full.resolution / 3


def test_what_eight_rows_miss_the_check_of_all_rows_shows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    fn, batch = ff.functionalize(model), samples(240)
    work = prepared(fn, fn.params, batch, CLASSES).work
    grams = dict(ff.token_grams(fn, fn.params, batch, CLASSES, blocks=ff.whole).grams)
    labels = dict.fromkeys(fn.params, "all")
    bad = torch.ones(240, dtype=torch.float64)
    bad[100:108] += 3e-5  # eight rows of 240, by less than the check allows
    wrong = {"all": bad[:, None] * grams["all"] * bad}
    checked = certificate.certify(wrong, work, labels=labels, limit=10**9)
    assert checked.holds
    found = round_off(wrong, work, checked.differences, never, labels=labels, limit=10**9, seed=1)
    blind = round_off(wrong, work, {"all": 0.0}, never, labels=labels, limit=10**9, seed=1)
    error = float(torch.linalg.matrix_norm(wrong["all"] - exact_gram(model, *batch), 2))
    assert blind.errors["all"] < error <= found.errors["all"]


class Casts(nn.Module):
    """A network that computes its norm and its softmax in float32, as most language models do."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.last, self.dtype = nn.Linear(16, 12), nn.Linear(12, 3), dtype

    def forward(self, x):
        x = self.first(x)
        wide = x.to(self.dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.last(wide.softmax(-1, dtype=self.dtype).to(x.dtype) + wide.to(x.dtype))


def test_what_a_model_casts_to_float32_is_exact_in_the_reference():
    torch.manual_seed(0)
    model, (x, y) = Casts(), samples(6)
    grams = ff.token_grams(fn := ff.functionalize(model), fn.params, (x, y), CLASSES, blocks=ff.whole)
    exact = Casts(torch.float64)
    exact.load_state_dict(model.state_dict())
    error = grams.grams["all"] - exact_gram(exact, x, y)
    assert grams.errors["all"] == pytest.approx(float(torch.linalg.matrix_norm(error)), rel=1e-5)


class OnlySingle(nn.Linear):
    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        return super().forward(x)


class Rounds(nn.Linear):
    def forward(self, x):
        return super().forward(torch.empty(x.shape).copy_(x).to(x.dtype))


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (OnlySingle, {}, "the model does not run in float64: TypeError: expected float32"),
        (Rounds, {}, "something in the model is rounded to a coarser dtype when it runs in float64"),
        (nn.Linear, {"dtype": torch.float64}, "the pass is in float64"),
    ],
)
def test_what_has_no_float64_keeps_the_value_of_its_dtype_and_says_why(model, options, reason):
    torch.manual_seed(0)
    measured, assumed = spectra_of(model(16, 3), samples(6), **options)
    assert measured.metadata["round_off"] == {"measured": False, "num_rows": 0, "reason": reason}
    assert measured.full.resolution == assumed.full.resolution
    assert assumed.metadata["round_off"]["reason"] == "self_check=False"


def never(rows):
    raise AssertionError("the gradients of eight rows of a small model are formed")


def test_a_memory_limit_without_room_for_float64_is_kept():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(16, 400), nn.Tanh(), nn.Linear(400, 3)), samples(4)
    fn = ff.functionalize(model)
    work = prepared(fn, fn.params, batch, CLASSES).work
    grams = ff.token_grams(fn, fn.params, batch, CLASSES).grams
    size = 8 * sum(p.numel() for p in model.parameters())
    none = dict.fromkeys(grams, 0.0)
    assert round_off(grams, work, none, never, limit=4 * size - 4).reason.startswith("the memory limit")
    passed = []

    def again(rows):
        passed.append(rows.num_tokens)
        return factored_grams(rows, PassOptions())[0]

    found, formed = (round_off(grams, work, none, again, limit=limit) for limit in (8 * size, 10**9))
    assert passed == [4]  # a quarter of the limit has room for two gradients
    assert found.num_rows == formed.num_rows == 4 and found.errors.keys() == grams.keys()
    for name, error in formed.errors.items():  # some eps in float32; in float64 both are exact beside it
        assert found.errors[name] == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("route", ["factored", "dense"])
def test_the_pass_in_float64_measures_what_formed_gradients_do(name, route, monkeypatch):
    model, batch = build(name)
    fn = ff.functionalize(model)

    def measured():
        found = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm(), blocks=ff.by_layer, route=route)
        assert found.metadata["round_off"]["measured"]
        return {name: float(error) for name, error in found.errors.items()}

    formed = measured()
    monkeypatch.setattr("fisherfunc.gradients.grams.round_off", partial(round_off, formed=0))
    for label, error in measured().items():
        assert error == pytest.approx(formed[label], rel=1e-6)


def test_errors_go_through_the_algebra_of_grams_and_through_files(tmp_path):
    torch.manual_seed(0)
    fn, batch = ff.functionalize(nn.Linear(16, 3)), samples(6)
    grams = ff.token_grams(fn, fn.params, batch, CLASSES)
    assert grams.block_error() == sum(grams.errors.values()) > 0
    for other in (grams.center(), grams.select([0, 3])):
        assert other.errors == grams.errors
    pairs = replace(grams, tokens=replace(grams.tokens, sequence=torch.arange(6) // 2))
    assert pairs.by_sequence().errors == {name: 2 * error for name, error in grams.errors.items()}
    grams.save(tmp_path / "grams")
    assert TokenGrams.load(tmp_path / "grams").errors == grams.errors
    assert replace(grams, errors=None).block_error() is None
