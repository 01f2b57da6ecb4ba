"""The check of every run sees what is wrong with any token, in any row, and nothing where all is right."""

from functools import partial

import pytest
import torch
from oracle import gradient_rows, gram_errors
from torch import nn
from torch.nn import functional
from zoo import CASES, build, token_ids

import fisherfunc as ff
from fisherfunc.gradients.checks import certificate, ordinary
from fisherfunc.gradients.survey.prepare import ROUTES, prepared

CAUSAL = ff.losses.causal_lm()


def of(name: str, batch=None, loss=None, dtype=torch.float64, **options) -> ff.TokenGrams:
    model, own = build(name, dtype=dtype)
    fn = ff.functionalize(model)
    loss = loss or getattr(ff.losses, CASES[name].kind)()
    return ff.token_grams(fn, fn.params, own if batch is None else batch, loss, **options)


def test_one_wrong_token_among_many_shows_and_its_stack_is_named():
    model, _ = build("gpt2", dtype=torch.float64)
    batch = {"input_ids": token_ids(70, 6)}
    fn = ff.functionalize(model)
    work = prepared(fn, fn.params, batch, CAUSAL).work
    grams = ff.token_grams(fn, fn.params, batch, CAUSAL).grams
    assert certificate.certify(grams, work, limit=10**9).holds
    for row in (0, 200, 349):
        wrong = {name: gram.clone() for name, gram in grams.items()}
        name = "transformer.h.1.mlp.c_fc.weight"
        wrong[name][row], wrong[name][:, row] = wrong[name][row] * 1.1, wrong[name][:, row] * 1.1
        found = certificate.certify(wrong, work, limit=10**9)
        sequence = int(work.tokens.sequence[row])
        assert not found.holds and found.block == name
        assert sequence in found.sequences and len(found.sequences) * 5 <= ordinary.MOST_TOKENS
        assert f"block {name!r} differs from an ordinary backward pass of sequence" in found.told()


@pytest.mark.parametrize("kind", ["classification", "custom"])
def test_a_row_that_is_lost_shows(kind):
    model, batch = build("mlp", dtype=torch.float64)
    losses = {
        "classification": ff.losses.classification(),
        "custom": ff.losses.custom(lambda output, batch: functional.cross_entropy(output, batch[-1], reduction="none")),
    }
    fn = ff.functionalize(model)
    work = prepared(fn, fn.params, batch, losses[kind]).work
    grams = ff.token_grams(fn, fn.params, batch, losses[kind]).grams
    for gram in grams.values():
        gram[1], gram[:, 1] = 0.0, 0.0
    assert not certificate.certify(grams, work, limit=10**9).holds


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_gradients_of_losses_that_are_all_but_zero_are_held_by_what_they_have_lost(size):
    """1 − p of a token with a loss of 1e-5 is known to some 16 eps/1e-5 in float32, a fifth of it: not to 1e-4."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(40, 4)
    with torch.no_grad():
        model.weight.mul_(size)
        y = model(x).argmax(1)
        losses = functional.cross_entropy(model(x), y, reduction="none")
    kept = (losses > 1e-6) & (losses < 1e-4) if size > 1 else losses > 0.1
    assert int(kept.sum()) > 5
    fn, loss, batch = ff.functionalize(model), ff.losses.classification(), (x[kept], y[kept])
    work, grams = prepared(fn, fn.params, batch, loss).work, ff.token_grams(fn, fn.params, batch, loss).grams
    held = [certificate.certify({n: f * k for n, k in grams.items()}, work, limit=10**9).holds for f in (1, 1.002, 4)]
    assert held == [True, size > 1, False]


def test_grams_that_are_all_lost_are_not_taken_for_gradients_whose_squares_vanish():
    model, batch = build("mlp", dtype=torch.float64)
    fn, loss = ff.functionalize(model), ff.losses.classification()
    work, grams = prepared(fn, fn.params, batch, loss).work, ff.token_grams(fn, fn.params, batch, loss).grams
    with pytest.raises(ValueError, match="all Grams are zero, and an ordinary backward pass has gradients up to"):
        certificate.certify({name: torch.zeros_like(gram) for name, gram in grams.items()}, work, limit=10**9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_does_not_pass(value):
    model, batch = build("mlp", dtype=torch.float64)
    fn, loss = ff.functionalize(model), ff.losses.classification()
    work, grams = prepared(fn, fn.params, batch, loss).work, ff.token_grams(fn, fn.params, batch, loss).grams
    name = next(iter(grams))
    grams[name][0, 1] = value
    assert not certificate.certify(grams, work, limit=10**9).holds


ROWS = {
    "sequences": {"unit": "sequence"},
    "some tokens": {"num_tokens": 7, "seed": 3},
    "blocks": {"blocks": ff.by_layer},
    "one block": {"blocks": ff.whole},
    "sampled": {"targets": ff.targets.sampled(2, seed=1)},
    "sampled sequences": {"targets": ff.targets.sampled(2, seed=1), "unit": "sequence"},
    "all classes": {"targets": ff.targets.all_classes()},
    "coordinates": {"max_coordinates": 5},
    "coordinates of blocks": {"max_coordinates": 9, "blocks": ff.by_layer},
    "float32 Grams": {"gram_dtype": torch.float32},
    "chunks": {"chunk_size": 1},
}


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_every_kind_of_row_is_held(name, options):
    found = of(name, **options).metadata["self_check"]
    tolerance = 1e-4 if "gram_dtype" in options else 1e-10
    assert found["held"] and found["tolerance"] == tolerance and found["difference"] < tolerance / 100


def test_parts_of_the_parameters_and_narrow_stacks_give_the_same_as_all_at_once():
    model, batch = build("gpt2", dtype=torch.float64)
    fn = ff.functionalize(model)
    work, grams = prepared(fn, fn.params, batch, CAUSAL).work, ff.token_grams(fn, fn.params, batch, CAUSAL).grams
    wrong = {name: 1.01 * gram for name, gram in grams.items()}
    roomy, tight = (certificate.certify(wrong, work, limit=limit) for limit in (10**9, 10**4))
    assert roomy.difference == pytest.approx(tight.difference, rel=0.5) and not tight.holds
    assert certificate.certify(grams, work, limit=10**4).difference < 1e-12


def test_bfloat16_is_held_to_its_rounding():
    found = of("gpt2", dtype=torch.bfloat16).metadata["self_check"]
    assert found["held"] and found["tolerance"] == torch.finfo(torch.bfloat16).eps ** 0.5


def test_a_model_that_computes_in_float32_inside_is_held_to_that():
    assert of("llama").metadata["self_check"]["tolerance"] == 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_resolution_that_is_assumed_is_that_of_the_coarsest_dtype_inside(dtype):
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
                return self.last(torch.tanh(self.first(x)).to(dtype).to(x.dtype)).to(x.dtype)

    model = Coarse().to(torch.float64 if dtype == torch.float32 else torch.float32)
    x = torch.randn(6, 5, dtype=model.first.weight.dtype)
    result = ff.fisher_spectrum(model, (x, torch.randint(3, (6,))), blocks=ff.whole, self_check=False)
    largest = float(result.full.eigenvalues[0])
    assert float(result.full.resolution) >= torch.finfo(dtype).eps * largest


def test_a_float32_model_that_runs_in_float64_is_known_to_float64():
    batch = (torch.randn(6, 5), torch.arange(6) % 3)
    full = ff.fisher_spectrum(nn.Linear(5, 3), batch, dtype=torch.float64, self_check=False).full
    assert full.resolution < 1e-12 * full.eigenvalues[0]


@pytest.mark.parametrize("scale", [1e-170, 0.0])
def test_a_zero_matrix_is_one_of_gradients_that_are_zero(scale):
    def losses(output, batch):
        return scale * nn.functional.cross_entropy(output, batch[1], reduction="none")[:, None]

    model, batch = nn.Linear(4, 3).double(), (torch.randn(6, 4).double(), torch.arange(6) % 3)
    run = partial(ff.fisher_spectrum, model, batch, loss=ff.losses.custom(losses, name="small"))
    if scale == 0:
        assert float(run().full.eigenvalues.sum()) == 0
    else:
        with pytest.raises(ValueError, match=r"largest entry is \d\.\de-17\d, that their squares vanish in float64"):
            run()


def test_what_is_given_up_after_a_check_has_failed_comes_to_an_end():
    found = certificate.Certificate(
        difference=1.0, tolerance=1e-4, block="a", sequences=(0, 1), failing=frozenset(["a", "b"]), differences={}
    )
    labels = {"a.weight": "a", "b.weight": "b", "c.weight": "c"}
    first = certificate.refused_then({}, ["stacks", "prefixes"], found, labels, labels)
    assert first == dict.fromkeys(["stacks", "prefixes"], found.told())
    second = certificate.refused_then(first, ["stacks"], found, labels, labels)  # it is exploited all the same
    assert second is not None and second.keys() - first.keys() == {"a.weight", "b.weight"}
    assert certificate.refused_then(second, ["stacks"], found, labels, labels) is None


def test_the_check_can_be_turned_off():
    assert of("mlp", self_check=False).metadata["self_check"] is None


class Sometimes(nn.Module):
    """A network of which few samples do something else; a trial would draw other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            y = self.last(torch.tanh(self.first(x)))
            rare = x[:, :1] > 1.5
            return torch.where(rare, self.rare(x, y), y) if bool(rare.any()) else y


class InnerGradient(Sometimes):
    def rare(self, x, y):
        return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0][:, :3]


class ReadsWeight(Sometimes):
    def rare(self, x, y):
        return y * self.first.weight.square().sum()


class LooksAhead(nn.Module):
    """A causal model, but for the gradient of documents that begin with the id 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, input_ids):
        h = torch.tanh(self.middle(self.embedding(input_ids))).cumsum(1)
        ahead = h.flip(1).cumsum(1).flip(1) * (input_ids[:, :1, None] == 0)
        return self.head(torch.tanh(h + ahead - ahead.detach()))


@pytest.mark.parametrize("kind", [InnerGradient, ReadsWeight])
def test_what_few_samples_do_is_seen(kind):
    model = kind().double()
    x = torch.randn(40, 5, dtype=torch.float64).clamp(max=1.4)
    x[[7, 23], 0] = 2.0
    batch = (x, torch.randint(3, (40,)))
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, batch, ff.losses.classification())
    rows = gradient_rows(model, "classification", batch)
    assert max(gram_errors(result.grams, rows, floor=1e-15).values()) < 1e-10


def test_a_document_whose_gradient_alone_looks_ahead_is_seen():
    model, ids = LooksAhead().double(), torch.randint(1, 11, (30, 8))
    ids[17, 0] = 0
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, {"input_ids": ids}, CAUSAL)
    rows = gradient_rows(model, "causal_lm", {"input_ids": ids})
    assert max(gram_errors(result.grams, rows, floor=1e-15).values()) < 1e-10


class Noisy(Sometimes):
    def rare(self, x, y):
        return y * torch.rand_like(y)


@pytest.mark.parametrize("route", ROUTES)
def test_a_model_that_draws_at_random_is_held_sample_by_sample(route):
    model = Noisy().double()
    x = torch.randn(5, 5, dtype=torch.float64)
    x[:, 0] = 2.0
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, (x, torch.randint(3, (5,))), ff.losses.classification(), route=route)
    assert result.metadata["self_check"]["held"]


class BackwardDependsOnTheRun(nn.Module):
    """A backward pass that no two runs have alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(_Counting.apply(self.layer(x)))


class _Counting(torch.autograd.Function):
    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        _Counting.count += 1
        return cotangent * _Counting.count


def test_a_backward_pass_that_is_no_function_is_refused():
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    with pytest.raises(ValueError, match=r"differs from an ordinary backward pass .*self_check=False"):
        ff.fisher_spectrum(BackwardDependsOnTheRun().double(), (x, y))


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_around_a_call_changes_nothing(route):
    model, batch = build("gpt2")
    fn = ff.functionalize(model)
    plain = ff.token_grams(fn, fn.params, batch, CAUSAL, route=route)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ff.token_grams(fn, fn.params, batch, CAUSAL, route=route)
        assert torch.is_autocast_enabled("cpu")
        rows = ff.per_token_gradients(fn, fn.params, batch, CAUSAL)
    assert torch.equal(inside.block(), plain.block())
    whole = torch.cat([r.flatten(1) for r in rows.values()], 1).double()
    torch.testing.assert_close(whole @ whole.T, plain.block(), rtol=1e-4, atol=1e-4 * float(plain.block().max()))


@pytest.mark.parametrize("scale", [2 / 3, 1 / 7, torch.tensor(2 / 3, dtype=torch.float64), 3])
@pytest.mark.parametrize("apply", [lambda w, c: w * c, lambda w, c: c * w, torch.mul])
def test_constants_keep_the_precision_of_what_they_multiply(scale, apply):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 16, dtype=torch.float64))

        def forward(self, x):
            return functional.linear(x, apply(self.weight, scale))

    model, batch = Scaled(), (torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, batch, ff.losses.regression())
    assert result.metadata["route"] == "factored"
    assert max(gram_errors(result.grams, gradient_rows(model, "regression", batch), floor=0.0).values()) < 1e-13


class CoarseSoftmax(nn.Module):
    """Attention with a softmax in float32 inside a float64 model; the gradient of the key's bias is round-off."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, input_ids):
        h = self.embedding(input_ids)
        scores = self.q(h) @ self.k(h).mT
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -1e9)
        return self.head(torch.tanh(scores.float().softmax(-1).to(h.dtype) @ self.v(h)))


def test_a_tensor_whose_gradient_is_round_off_does_not_make_a_model_dense():
    model, batch = CoarseSoftmax().double(), {"input_ids": torch.randint(11, (4, 7))}
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, batch, CAUSAL)
    assert result.metadata["route"] == "factored"
    rows = gradient_rows(model, "causal_lm", batch)
    assert max(gram_errors(result.grams, rows, floor=torch.finfo(torch.float32).eps).values()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["classification", "regression", "custom"])
def test_what_is_predicted_almost_exactly_is_no_false_alarm(kind, dtype):
    """Gradients that are mostly round-off, beside ordinary ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)).to(dtype)
    x = torch.randn(40, 5, dtype=dtype)
    with torch.no_grad():
        model[2].weight.mul_(60)
        y = model(x) if kind == "regression" else model(x).argmax(1)
    if kind == "regression":
        y[::7] += 1
        y[1::7] += 1e-5
    else:
        y[::7] = (y[::7] + 1) % 3
    loss = {
        "classification": ff.losses.classification(),
        "regression": ff.losses.regression(),
        "custom": ff.losses.custom(lambda output, batch: functional.cross_entropy(output, batch[-1], reduction="none")),
    }[kind]
    fn = ff.functionalize(model)
    for route in ROUTES:
        found = ff.token_grams(fn, fn.params, (x, y), loss, route=route).metadata
        assert found["self_check"]["held"] and found["route"] == route
        assert float(ff.token_grams(fn, fn.params, (x, y), loss).tokens.loss.min()) < 1e-6
