"""The factored route on models made to mislead its probes: each was a wrong Gram or a crash once."""

from collections.abc import Callable

import pytest
import torch
from oracle import gradient_rows, gram_errors
from passes import grams, workload
from token_models import Tokens, token_batch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from zoo import VOCAB

import fisherfunc as ff
from fisherfunc.gradients.capture import recorder as _taps
from fisherfunc.gradients.capture.probe import probe
from fisherfunc.gradients.factored import plan as plans


def is_odd(input_ids: torch.Tensor) -> bool:
    """Of a sequence: its first id decides what the model does with it."""
    return bool(input_ids[0, 0] % 2)


class ShortOnesByEinsum(Tokens):
    """Prefixes give the same values by a function that no rule knows."""

    def between(self, x, input_ids):
        if x.shape[1] <= 3:
            return torch.tanh(torch.einsum("bse,de->bsd", x, self.middle.weight) + self.middle.bias)
        return torch.tanh(self.middle(x))


class OddOnesByAnotherHead(Tokens):
    def forward(self, input_ids):
        x = self.between(self.embedding(input_ids), input_ids)
        return self.other_head(x) if is_odd(input_ids) else self.head(x)


class OddOnesPastTheHead(Tokens):
    def forward(self, input_ids):
        x = self.between(self.embedding(input_ids), input_ids)
        slope = torch.linspace(0, 1, VOCAB, dtype=x.dtype, device=x.device)
        return self.head(x) + x.sum(dim=-1, keepdim=True) * slope if is_odd(input_ids) else self.head(x)


class OddOnesCoupled(Tokens):
    def forward(self, input_ids):
        logits = super().forward(input_ids)
        return logits.cumsum(dim=1) if is_odd(input_ids) else logits


class OddOnesDetached(Tokens):
    def between(self, x, input_ids):
        return x.detach() if is_odd(input_ids) else torch.tanh(self.middle(x))


class WeakLeakOfLogits(Tokens):
    def forward(self, input_ids):
        logits = super().forward(input_ids)
        return logits + 1e-7 * logits.roll(1, dims=1)


class WeakLookAhead(Tokens):
    def between(self, x, input_ids):
        x = torch.tanh(self.middle(x))
        return x + 1e-7 * x.flip(1)


class FixedLength(Tokens):
    def between(self, x, input_ids):
        return torch.tanh(self.middle(x + self.mixing(x.mT).mT))


class LengthRefused(Tokens):
    def between(self, x, input_ids):
        return {6: torch.tanh(self.middle(x))}[x.shape[1]]


class FirstOutputOverwritten(Tokens):
    def between(self, x, input_ids):
        x *= 3
        return torch.tanh(self.middle(x))


class AlsoWithoutGradient(Tokens):
    def between(self, x, input_ids):
        with torch.no_grad():
            gate = self.middle(x).sigmoid()
        return torch.tanh(self.middle(x)) * gate


class InsideVmap(Tokens):
    def between(self, x, input_ids):
        return torch.vmap(lambda row: torch.tanh(self.middle(row)))(x)


class ByKeyword(Tokens):
    def between(self, x, input_ids):
        return torch.mm(x[0], mat2=self.middle.weight)[None]


class Checkpointed(Tokens):
    def between(self, x, input_ids):
        return checkpoint(lambda x: torch.tanh(self.middle(x)), x, use_reentrant=False)


class EmbeddedAfterTheHead(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight

    def forward(self, input_ids):
        logits = super().forward(input_ids)
        self.embedding(input_ids)
        return logits


class HeadAlone(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.head.requires_grad_()


MODELS = [
    ShortOnesByEinsum,
    OddOnesByAnotherHead,
    OddOnesPastTheHead,
    OddOnesCoupled,
    OddOnesDetached,
    WeakLeakOfLogits,
    WeakLookAhead,
    FixedLength,
    LengthRefused,
    FirstOutputOverwritten,
    AlsoWithoutGradient,
    InsideVmap,
    ByKeyword,
    Checkpointed,
    EmbeddedAfterTheHead,
    HeadAlone,
]


def off(result: ff.TokenGrams, rows: dict[str, torch.Tensor]) -> float:
    return max(gram_errors(result.grams, rows, floor=1e-16).values())


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("rule", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_grams_of_misleading_models_equal_those_of_a_loop_of_backward_passes(kind, rule, chunk_size, monkeypatch):
    if not rule:
        monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, batch, loss = kind().double(), token_batch(), ff.losses.causal_lm()
    if kind.__name__.startswith("OddOnes"):  # what one document of a batch is decides for the others
        loss = ff.losses.each_alone(loss)
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, batch, loss, chunk_size=chunk_size)
    assert off(result, gradient_rows(model, "causal_lm", batch)) < 1e-10
    if kind is not Checkpointed:  # what it computes again does not pass the recorder
        assert result.metadata["route"] == "factored"


def test_an_output_layer_that_is_constant_is_closed_form():
    assert probe(workload(HeadAlone().double(), token_batch(), "causal_lm"))[0].head == ("head.weight", 0)


class PooledAtTheLastId(Tokens):
    """As GPT-2's classifier: the first sequence of the test has one id, so its loss lies at the place of its number."""

    def forward(self, input_ids):
        last = (input_ids != 0).sum(dim=1) - 1
        return super().forward(input_ids)[torch.arange(len(last)), last]


def test_a_place_that_is_right_in_one_sequence_is_not_assumed_in_another():
    model, batch = PooledAtTheLastId().double(), {**token_batch(), "labels": torch.tensor([1, 2, 3])}
    batch["input_ids"][0, 1:] = 0
    result = grams(model, batch, "classification")
    assert off(result, gradient_rows(model, "classification", batch)) < 1e-10


def blurred(output: torch.Tensor, batch) -> torch.Tensor:
    """Symmetric, with nothing at the ends: weights that are linear in the position do not tell it from the identity."""
    losses = ff.losses.causal_lm().values(output, batch)
    inner = functional.pad(losses[:, 1:-1], (2, 2))
    return inner[:, 1:-1] / 2 + inner[:, 2:] / 4 + inner[:, :-2] / 4


def faintly_coupled(output: torch.Tensor, batch) -> torch.Tensor:
    losses = ff.losses.causal_lm().values(output, batch)
    return losses + 1e-8 * losses.roll(2, dims=1)


def normalised(output: torch.Tensor, batch) -> torch.Tensor:
    losses = ff.losses.causal_lm().values(output, batch)
    return losses / losses.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("values", [blurred, faintly_coupled, normalised])
def test_losses_that_couple_places_are_not_taken_place_by_place(values: Callable):
    fn, batch = ff.functionalize(Tokens().double()), token_batch()
    factored_route, dense_route = (
        ff.token_grams(fn, fn.params, batch, ff.losses.custom(values), route=route) for route in ("factored", "dense")
    )
    assert factored_route.metadata["route"] == "factored" and factored_route.metadata["output_layer"] is None
    for name, gram in dense_route.grams.items():
        torch.testing.assert_close(factored_route.grams[name], gram, atol=1e-12 * float(gram.norm()), rtol=0)


class LoudSometimes(Tokens):
    """Inputs whose squared norm is beyond float16, in the odd sequences."""

    def forward(self, input_ids):
        loud = 120.0 if is_odd(input_ids) else 1.0
        x = torch.ones_like(self.embedding(input_ids)) * loud + self.embedding(input_ids)
        return self.head(torch.tanh(self.middle(x) / loud) * loud) * 1e-2


def test_products_of_float16_factors_do_not_overflow(monkeypatch):
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, batch = LoudSometimes().half(), token_batch()
    result = grams(model, batch, "causal_lm")
    rows = gradient_rows(model.double(), "causal_lm", batch)
    assert result.metadata["output_layer"] == "head.weight"
    assert max(gram_errors(result.grams, rows, floor=1e-3).values()) < 2e-2


def test_a_model_that_casts_its_products_is_taken_as_it_is():
    class Autocast(Tokens):
        def forward(self, input_ids):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(input_ids)

    model, batch = Autocast(), token_batch()
    rows = gradient_rows(model, "causal_lm", batch)
    assert max(gram_errors(grams(model, batch, "causal_lm").grams, rows, floor=1e-3).values()) < 3e-2


def uses_of(call: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> _taps.Recording:
    parameter = torch.randn(shape)
    recorder = _taps.Recorder({"p": parameter})
    with recorder:
        call(parameter)
    return recorder.recording


MATRIX, ROWS = torch.randn(4, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda p: p @ p, (4, 4)),
        (lambda p: functional.linear(p, p), (4, 4)),
        (lambda p: functional.linear(ROWS, p), (4,)),
        (lambda p: functional.linear(ROWS, MATRIX, p), (1,)),
        (lambda p: torch.addmm(p, ROWS, MATRIX), (1,)),
        (lambda p: torch.mm(ROWS, mat2=p), (4, 4)),
        (lambda p: torch.vmap(lambda row: functional.linear(row, p))(ROWS), (4, 4)),
    ],
    ids=["squared", "of itself", "vector", "broadcast bias", "broadcast sum", "keyword", "vmap"],
)
def test_a_call_that_a_rule_only_seems_to_fit_is_unknown(call, shape):
    assert set(uses_of(call, shape).unknown) == {"p"}


def test_a_use_without_gradients_is_none():
    with torch.no_grad():
        recording = uses_of(lambda p: functional.linear(ROWS, p.T) + p.sum(), (4, 4))
    assert not recording.uses and not recording.unknown
