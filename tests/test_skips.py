"""Modules below the floor of a pass are not called, and nothing that is needed of them is lost."""

import copy
import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from oracle import gradient_rows, gram_errors
from test_cuts import Tower, samples, unchecked
from test_factored import grams, workload
from torch import nn
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.factored import _taps
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.gradients.factored.calls import Made
from fisherfunc.gradients.factored.probe import probe
from fisherfunc.gradients.factored.recording import Directions
from fisherfunc.gradients.factored.skips import ModuleCall, Returned, instead_of, returned_by, skippable
from fisherfunc.gradients.factored.structure import trace
from fisherfunc.gradients.module_calls import HOOK, answered_by, watch_parts

CALLS = Counter()

EACH_ALONE = ff.losses.each_alone(ff.losses.classification())  # what a batch holds decides for all of it


class Counting(nn.Linear):
    """A layer that says when it runs."""

    def forward(self, x):
        CALLS[self.number] += 1
        return super().forward(x)


def counted(monkeypatch, skip):
    """How often each block of a model in groups runs, and the Grams."""
    with monkeypatch.context() as patch:
        unchecked(patch)
        if not skip:
            patch.setattr(plans, "skippable", lambda *_: [])
        model = Tower()
        for number, block in enumerate(model.blocks):
            block.__class__, block.number = Counting, number
        CALLS.clear()
        result = grams(model, samples(), "classification", chunk_size=1)
        assert result.metadata["passes_from_cuts"] >= 3
        return Counter(CALLS), result.grams


def test_a_module_runs_once_to_know_its_value_and_for_passes_that_want_it(monkeypatch):
    skipped, found = counted(monkeypatch, skip=True)
    run, expected = counted(monkeypatch, skip=False)
    spared = {number: run[number] - skipped[number] for number in run}
    assert spared[0] == spared[1] > spared[2] >= 9 and spared[3] == 0  # the first are below the floors of most passes
    assert all(torch.equal(found[name], gram) for name, gram in expected.items())


def test_most_of_a_transformer_is_skipped():
    model, batch = build("gpt2", dtype=torch.float64)
    work = workload(model, batch, "causal_lm")
    structure, *_ = probe(work)
    traced = trace(work, work.longest, structure, leaves=structure.dense, note=True)
    skipped = plans._skipped(traced, plans._levels(traced, structure).cuts)
    names = {cut[0]: [call.name.removeprefix("transformer.") for call in calls] for cut, calls in skipped.items()}
    below = ["wte", "wpe", "drop"]
    assert names["transformer.h.0.attn.c_proj.bias"] == [*below, "h.0.ln_1", "h.0.attn"]
    assert names["transformer.h.1.attn.c_proj.bias"] == [*below, "h.0", "h.1.ln_1", "h.1.attn"]


def test_modules_are_skipped_on_prefixes_too(monkeypatch):
    unchecked(monkeypatch)
    lengths = set()

    def counted(returned, known):
        lengths.add(known.shape[1])
        return instead_of(returned, known)

    monkeypatch.setattr(_taps, "instead_of", counted)
    model, batch = build("gpt2", dtype=torch.float64)
    result = grams(model, batch, "causal_lm", chunk_size=2)
    assert result.metadata["passes_from_cuts"] > 0
    assert max(lengths) == batch["input_ids"].shape[1] and len(lengths) >= 3


class Forgetful(Tower):
    """Its first block leaves something behind in the model, that the head of some samples needs."""

    def __init__(self, variant):
        super().__init__()
        self.leaver = Leaver(self, variant)

    def forward(self, x):
        h = super().forward(self.leaver(x))
        return h + self.left if bool((x[:, :1] > 0).any()) else h


class Leaver(nn.Module):
    def __init__(self, model, variant):
        super().__init__()
        self.layer, self.model, self.variant = nn.Linear(6, 6).double(), [model], variant

    def forward(self, x):
        h = self.layer(x)
        self.model[0].left = h[:, :3].detach() if self.variant == "value" else h[:, :3]
        return h.softmax(-1)


@pytest.mark.parametrize("variant", ["value", "gradient"])
def test_what_a_module_leaves_behind_is_not_missed(variant, monkeypatch):
    unchecked(monkeypatch)
    model, batch = Forgetful(variant), samples()
    result = grams(model, batch, EACH_ALONE)
    assert result.metadata["passes"] > 1 and not result.metadata["passes_from_cuts"]
    errors = gram_errors(result.grams, gradient_rows(Forgetful(variant), "classification", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


CUT = Made(call=("w", 0, 3), number=9, shape=(1, 7, 4), kind="torch.float32 on cpu", num_bytes=112)
HIDDEN = Returned(shapes=((1, 7, 5), None), kind="torch.float32 on cpu", alone=False)


def call(name, began, others, number, returned=HIDDEN):
    return ModuleCall(
        name=name, began=began, others=others, number=number, call=("w", 0, 1), uses={}, returned=returned
    )


def test_of_modules_inside_each_other_the_outermost_that_ends_before_the_cut_is_skipped():
    calls = [call("a.b", 1, 0, 2), call("a.c", 2, 0, 4), call("a", 0, 2, 5), call("d.e", 4, 0, 8), call("d", 3, 1, 9)]
    assert [one.name for one in skippable(calls, CUT)] == ["a", "d.e"]


@pytest.mark.parametrize(
    "returned",
    [
        None,
        Returned(shapes=((1, 6, 5),), kind="torch.float32 on cpu", alone=True),
        Returned(shapes=((2, 7, 5),), kind="torch.float32 on cpu", alone=True),
        Returned(shapes=((1, 7, 5),), kind="torch.float64 on cpu", alone=True),
    ],
)
def test_modules_that_return_something_else_are_called(returned):
    assert skippable([call("a", 0, 0, 2, returned)], CUT) == []


def test_modules_that_are_called_twice_are_called():
    assert skippable([call("a", 0, 0, 2), call("a", 1, 0, 4)], CUT) == []


def test_what_can_be_replaced_is_tensors_in_the_graph():
    h = torch.zeros(1, 7, 5, requires_grad=True)
    assert returned_by((h, None)) == replace(HIDDEN, kind=f"torch.float32 on {h.device}")
    assert returned_by(h) == Returned(shapes=((1, 7, 5),), kind=f"torch.float32 on {h.device}", alone=True)
    for other in (None, (None,), (h, h.detach()), (h, 3), [h], (h, h.double()), {"h": h}):
        assert returned_by(other) is None


def test_what_is_put_instead_has_the_places_of_what_is_known():
    h, nothing = instead_of(HIDDEN, torch.ones(2, 3, 4))
    assert nothing is None and h.shape == (2, 3, 5) and h.isnan().all() and h.requires_grad and not h.is_leaf
    alone = instead_of(Returned(shapes=((1, 5),), kind="torch.float32 on cpu", alone=True), torch.ones(3, 4))
    assert alone.shape == (3, 5)


class Halting(nn.Module):
    """A step that is done again until it has gone far enough: more often for some samples than for others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.step, self.last, self.head = (nn.Linear(6, size).double() for size in (6, 6, 6, 3))

    def forward(self, x):
        h, gone = self.first(x), 0.0
        while not gone >= 1:
            h = h + self.step(h).softmax(-1)
            gone += 0.6 if bool((x[:, :1] > 0).any()) else 1.0
        return self.head(h + self.last(h).softmax(-1))


def test_a_module_that_is_called_more_often_for_some_sequences_is_no_obstacle(monkeypatch):
    unchecked(monkeypatch)
    model, batch = Halting(), samples()
    result = grams(model, batch, EACH_ALONE)
    errors = gram_errors(result.grams, gradient_rows(model, "classification", batch), floor=1e-16)
    assert result.metadata["passes"] > 1 and max(errors.values()) < 1e-10, errors


def test_a_module_is_skipped_once():
    directions = Directions(known=torch.ones(1, 7, 4), skipped={"a": call("a", 0, 0, 2)})
    recorder = _taps.Recorder({}, directions)
    recorder.answer("a", lambda: None)
    with pytest.raises(LookupError, match="'a' was called once"):
        recorder.answer("a", lambda: None)


def test_a_watched_module_is_as_it_was_but_where_it_is_answered():
    model = nn.Sequential(nn.Linear(2, 2))
    x = torch.ones(1, 2)
    expected, forward = model(x), model[0].forward
    watch_parts(model)
    assert torch.equal(model(x), expected) and model[0].forward == forward
    with pytest.raises(KeyError), answered_by(lambda name, run: {"0": run()}["1"]):
        model(x)
    with answered_by(lambda name, run: (name, run())):
        name, value = model(x)
        assert name == "0" and torch.equal(value, expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_watched_module_are_themselves(copied):
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    watch_parts(model)
    other = copied(model[0])
    other.weight = nn.Parameter(2 * model[0].weight)
    with answered_by(lambda name, run: pytest.fail(name)):
        assert torch.equal(other(x), nn.functional.linear(x, other.weight, model[0].bias))


def test_watching_keeps_no_module_alive():
    model = nn.Sequential(nn.Linear(2, 2))
    watch_parts(model)
    gone = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_replicated_as_a_whole_is_left_alone():
    model = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))), nn.Tanh())
    watch_parts(model)
    assert [name for name, module in model.named_modules() if HOOK in vars(module)] == ["1"]
