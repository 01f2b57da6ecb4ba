"""The factored route: its probes, its memory groups, its choice of what to form, and the self-check."""

from dataclasses import replace

import pytest
import torch
from grains import TINY
from oracle import gradient_rows, gram_errors
from passes import grams, workload
from token_models import Bigram, SometimesUnbatched
from torch import nn
from torch.testing import assert_close
from zoo import CASES, VOCAB, build, causal_batch

import fisherfunc as ff
from fisherfunc.gradients import by_route as doors
from fisherfunc.gradients.capture import rules
from fisherfunc.gradients.capture.probe import is_causal, probe
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.gradients.factored import route as factored
from fisherfunc.runtime.grain import divided_as

HEAD = {"plain": "head.weight", "capped": "head.weight", "overwritten": "head.weight", "looks ahead": "head.weight"}


@pytest.mark.parametrize("variant", ["plain", "capped", "leaks", "bypassed", "overwritten", "looks ahead"])
def test_sparsity_is_exploited_where_a_probe_finds_it_and_never_else(variant):
    model, batch = Bigram(variant).double(), causal_batch()
    structure, traced, _ = probe(work := workload(model, batch, "causal_lm"))
    assert (structure.head[0] if structure.head else None) == HEAD.get(variant)
    if structure.head:
        assert is_causal(work, structure, traced) == (variant in ("plain", "capped", "overwritten"))
    result = grams(model, batch, "causal_lm", self_check=True)
    errors = gram_errors(result.grams, gradient_rows(model, "causal_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "lstm", "mamba"])
def test_decoders_are_found_causal(name):
    structure, traced, _ = probe(work := workload(*build(name), CASES[name].kind))
    assert is_causal(work, structure, traced)


@pytest.mark.parametrize("name", ["bert", "albert", "deberta_v2", "t5"])
def test_models_that_look_ahead_are_found_not_causal(name):
    structure, traced, _ = probe(work := workload(*build(name), CASES[name].kind))
    assert structure.head is not None and not is_causal(work, structure, traced)


@pytest.mark.parametrize(("options", "used"), [({}, False), ({"chunk_size": 3}, True), ({"num_tokens": 1}, True)])
def test_nobody_asks_for_prefixes_where_all_tokens_of_a_sequence_are_passed_at_once(options, used):
    """As on a GPU, whose chunks are as large as a sequence; of one token the prefix is shorter."""
    model, _ = build("llama", dtype=torch.float64)
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))}
    fn = ff.functionalize(model)
    with divided_as(replace(TINY, features=64)):
        found = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm(), seed=3, **options)
    assert found.metadata["causal_prefixes"] == used and ("prefixes" in found.metadata["given_up"]) != used
    rows = gradient_rows(model, "causal_lm", batch)
    if "num_tokens" not in options:
        assert max(gram_errors(found.grams, rows, floor=1e-16).values()) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "falcon", "albert", "bert", "shared"])
def test_linear_maps_stay_factored_when_forming_is_dear(name, monkeypatch):
    """With the cost rule off every weight of a linear map is contracted, tied and repeated ones with cross terms."""
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, batch = build(name, dtype=torch.float64)
    result = grams(model, batch, CASES[name].kind, chunk_size=2)
    reasons = result.metadata["formed_parameters"]
    assert not [n for n, p in model.named_parameters() if n in reasons and p.ndim == 2], reasons
    errors = gram_errors(result.grams, gradient_rows(model, CASES[name].kind, batch), floor=1e-16)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_memory_and_chunks_change_the_passes_and_nothing_else(name):
    model, batch = build(name, dtype=torch.float64)
    kind = CASES[name].kind
    plain = grams(model, batch, kind, chunk_size=1)
    assert plain.metadata["passes"] == 1
    for step in range(1, 20):  # at first there are fewer slots a pass, then more passes
        limit = int(plain.metadata["predicted_peak_bytes"] * 0.9**step)
        tight = grams(model, batch, kind, chunk_size=1, memory_limit=limit)
        if tight.metadata["passes"] > 1:
            break
    assert tight.metadata["route"] == "factored" and tight.metadata["passes"] > 1
    assert tight.metadata["predicted_peak_bytes"] <= limit
    for other in (tight, grams(model, batch, kind), grams(model, batch, kind, chunk_size=3)):
        for n, gram in plain.grams.items():
            assert_close(other.grams[n], gram, atol=1e-12 * float(plain.block().diagonal().max()), rtol=0)


@pytest.fixture
def wrong_rule(monkeypatch):
    """The rule of linear maps hands out half again the input."""

    def wrong(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
        return [(weight, rules.Map(source=1.5 * input, axis=0)), (bias, rules.Shift(shape=weight.shape[:1]))]

    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    monkeypatch.setitem(rules.RULES, nn.functional.linear, wrong)


@pytest.mark.parametrize("long", [False, True], ids=["checked when done", "tried before"])
def test_a_weight_whose_factors_are_wrong_is_formed(long, monkeypatch, wrong_rule):
    trials, passed = [], factored.tried
    monkeypatch.setattr(factored, "tried", lambda *a, **k: trials.append(passed(*a, **k)) or trials[-1])
    model, batch = build("bert", dtype=torch.float64)
    batch = batch if long else {name: tensor[:1] for name, tensor in batch.items()}  # more stacks than one, or one
    result = grams(model, batch, "masked_lm")
    assert any(found is not None for found in trials) == long
    reasons = result.metadata["formed_parameters"]
    assert reasons["bert.encoder.layer.0.output.dense.weight"] == "its factors do not give its gradient"
    assert result.metadata["self_check"]["held"] and ("stacks" in result.metadata["given_up"]) == long
    errors = gram_errors(result.grams, gradient_rows(model, "masked_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-9, errors


def test_a_short_pass_that_nobody_checks_is_tried_before(wrong_rule):
    model, batch = build("bert", dtype=torch.float64)
    result = grams(model, batch, "masked_lm", self_check=False)
    assert result.metadata["self_check"] is None
    errors = gram_errors(result.grams, gradient_rows(model, "masked_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-9, errors


def test_what_no_factored_pass_gets_right_is_passed_over_by_the_dense_route(monkeypatch):
    factored_grams, passes = doors.factored_grams, []

    def wrong(*how):
        found, plan = factored_grams(*how)
        passes.append(plan)
        found["bert.encoder.layer.0.output.dense.weight"] *= 1 + 1e-6
        return found, plan

    monkeypatch.setattr(doors, "factored_grams", wrong)
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, batch = build("bert", dtype=torch.float64)
    result = grams(model, batch, "masked_lm")
    assert result.metadata["route"] == "dense" and result.metadata["self_check"]["held"]
    assert "the check of the factored route failed: block 'bert." in result.metadata["route_reason"]
    first, bare, formed = passes
    assert first.exploited and not bare.exploited and bare.structure.refused.keys() == set(first.exploited)
    assert formed.formed.keys() - bare.formed.keys() == {"bert.encoder.layer.0.output.dense.weight"}


def test_a_tensor_of_unknown_use_is_named_with_the_function_that_used_it():
    model, batch = build("mixtral")
    reasons = grams(model, batch, "causal_lm").metadata["formed_parameters"]
    assert reasons["model.layers.0.mlp.experts.down_proj"] == "used by __getitem__"


class SometimesScaled(nn.Module):
    """The second sequence uses the weight in a way that the first, longer one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6)
        self.middle = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        if not bool(attention_mask.all()):
            x = x @ (2 * self.middle.weight)
        return self.head(torch.tanh(self.middle(x)))


def test_a_model_whose_sequences_differ_in_structure_is_started_again():
    torch.manual_seed(0)
    model, batch = SometimesScaled().double(), causal_batch()
    result = grams(model, batch, ff.losses.each_alone(ff.losses.causal_lm()))  # one document scales all of a batch
    assert "middle.weight" in result.metadata["formed_parameters"]
    errors = gram_errors(result.grams, gradient_rows(model, "causal_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


class Curtailed(nn.Module):
    """Values are causal, gradients are not: all but the last four states of a sequence are cut off from the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle, self.head = nn.Embedding(VOCAB, 6), nn.Linear(6, 6), nn.Linear(6, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.middle(self.embedding(input_ids)).cumsum(dim=1)
        return self.head(torch.tanh(torch.cat([states[:, :-4].detach(), states[:, -4:]], dim=1)))


def test_gradients_that_depend_on_the_length_where_values_do_not_rule_prefixes_out():
    model, batch = Curtailed().double(), {"input_ids": torch.randint(VOCAB, (2, 40))}
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm())
    assert result.metadata["route"] == "factored" and not result.metadata["causal_prefixes"]
    errors = gram_errors(result.grams, gradient_rows(model, "causal_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("name", ["gpt2", "lstm"])
def test_chunks_of_one_sequence_run_on_prefixes_of_their_own(name, monkeypatch):
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, _ = build(name, dtype=torch.float64)
    batch = {"input_ids": torch.randint(4, VOCAB, (2, 14))}
    result = grams(model, batch, "causal_lm", chunk_size=4)
    assert result.metadata["causal_prefixes"]
    errors = gram_errors(result.grams, gradient_rows(model, "causal_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("order", [(3, 6), (6, 3)])
@pytest.mark.parametrize("route", ["factored", "dense"])
def test_a_sequence_that_cannot_be_batched_is_passed_over_in_another_way(order, route):
    torch.manual_seed(0)
    model = SometimesUnbatched("plain").double()
    batches = [{"input_ids": torch.randint(VOCAB, (1, length))} for length in order]
    fn = ff.functionalize(model)
    result = ff.token_grams(fn, fn.params, batches, ff.losses.causal_lm(), route=route)
    assert result.metadata["route"] == "dense" and result.metadata["route_reason"]
    rows = [gradient_rows(model, "causal_lm", batch) for batch in batches]
    together = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    assert max(gram_errors(result.grams, together, floor=1e-16).values()) < 1e-10
