"""Calls of modules: seen, played back in their order, and nothing that is needed of them is lost."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from oracle import gradient_rows, gram_errors
from passes import grams, workload
from tight import tighten, unchecked
from torch import nn
from torch.testing import assert_close
from towers import Tower, samples
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.autodiff.module_calls import HOOK, answered_by, watch_parts
from fisherfunc.gradients.capture import recorder as _taps
from fisherfunc.gradients.capture.calls import ModuleCall, Outline, Returned, Way, outline_of, returned_by
from fisherfunc.gradients.capture.probe import probe
from fisherfunc.gradients.capture.recording import Directions, Reached
from fisherfunc.gradients.capture.segments import WHOLE
from fisherfunc.gradients.capture.structure import head_of, trace, trace_prefix, vectors
from fisherfunc.gradients.factored import plan as plans

CALLS = Counter()

EACH_ALONE = ff.losses.each_alone(ff.losses.classification())  # what a batch holds decides for all of it


class Counting(nn.Linear):
    """A layer that says when it runs."""

    def forward(self, x):
        CALLS[self.number] += 1
        return super().forward(x)


def test_a_module_below_a_segment_is_not_called_for_it(monkeypatch):
    unchecked(monkeypatch)
    counts = []
    for segments_of in (plans.segments_of, lambda *_, **__: WHOLE):
        monkeypatch.setattr(plans, "segments_of", segments_of)
        model = Tower()
        for number, block in enumerate(model.blocks):
            block.__class__, block.number = Counting, number
        CALLS.clear()
        result = grams(model, samples(), "classification", chunk_size=1)
        assert result.metadata["passes"] > 3
        counts.append(Counter(CALLS))
    divided, undivided = counts
    assert undivided[0] - divided[0] >= 2 * len(samples()[0])  # which every pass has to run there


def outline_of_gpt2(*, most):
    model, batch = build("gpt2", dtype=torch.float64)
    work = workload(model, batch, "causal_lm")
    structure, *_ = probe(work)
    traced = trace(work, work.longest, structure, leaves=structure.dense, note=True)
    places = batch["input_ids"].shape[1]
    outline = outline_of(traced.recording.modules, lambda call: sum(call.uses.values()), most, places)
    return work, structure, outline


def names(outline, *, opened):
    return [one.call.name.removeprefix("transformer.") for one in outline.calls if one.opened == opened]


def test_a_call_is_opened_where_it_holds_too_much():
    _, _, outline = outline_of_gpt2(most=100)
    assert names(outline, opened=True) == ["transformer"]  # returns no tensor
    assert names(outline, opened=False) == ["wte", "wpe", "drop", "h.0", "h.1", "ln_f", "lm_head"]
    _, _, opened = outline_of_gpt2(most=6)
    assert names(opened, opened=True) == ["transformer", "h.0", "h.1"]
    assert "h.0.ln_1" in names(opened, opened=False) and "h.1.mlp" in names(opened, opened=False)
    assert sorted(one.rank for one in opened.calls) == list(range(len(opened.calls)))
    block = next(one for one in opened.calls if one.call.name == "transformer.h.0")
    assert block.inside == 4 and block.playable  # it ends after all that is inside of it
    assert all(one.rank < block.rank for one in opened.calls if one.call.name.startswith("transformer.h.0."))


@pytest.mark.parametrize("most", [100, 6])
def test_what_is_played_back_leads_to_the_same_values_on_prefixes_too(most):
    work, structure, outline = outline_of_gpt2(most=most)
    whole = trace(work, work.longest, structure, way=Way(outline=outline))
    returned = {key: tensor.detach() for key, (tensor, _) in whole.recording.returned.items()}
    for outer in outline.playable:
        way = Way(outline=outline, floor=outer.rank, played={k: v for k, v in returned.items() if k[0] <= outer.rank})
        again = trace(work, work.longest, structure, way=way)
        assert_close(again.losses, whole.losses, rtol=1e-12, atol=1e-13)
        if outer.call.uses_until < len(whole.recording.uses):
            part = trace_prefix(work, work.longest, 3, structure, way=way)
            expected = vectors(head_of(whole.recording, structure))[:, :3]
            assert_close(part.recording.end, expected, rtol=1e-12, atol=1e-13)


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
    assert result.metadata["passes"] > 1 and result.metadata["segments"] == 1
    errors = gram_errors(result.grams, gradient_rows(Forgetful(variant), "classification", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


def test_what_can_be_played_back_is_tensors_in_the_graph():
    h = torch.zeros(1, 7, 5, requires_grad=True)
    assert returned_by((h, None)) == Returned(shapes=((1, 7, 5), None), alone=False)
    assert returned_by(h) == Returned(shapes=((1, 7, 5),), alone=True)
    for other in (None, (h, h.detach()), (h, 3), [h], {"h": h}):
        assert returned_by(other) is None


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


class Seen(nn.Module):
    """A layer that triples the cotangent of what it is given, or leaves a half of that behind."""

    def __init__(self, variant):
        super().__init__()
        self.layer, self.variant, self.left = nn.Linear(6, 6), variant, None

    def forward(self, h):
        if self.variant == "hook" and h.requires_grad:
            h.register_hook(lambda cotangent: 3 * cotangent)
        if self.variant == "left":
            self.left = h.detach() / 2
        return h + self.layer(h).softmax(-1)


class Around(nn.Module):
    """Layers of which the second goes around the others, and may read what the first has left behind."""

    def __init__(self, variant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.seen, self.aside, self.last = map(Seen, ("left", variant, "", ""))
        self.head, self.variant, self.same = nn.Linear(6, 3), variant, nn.Dropout(0.5)
        self.gate, self.scale = nn.Linear(6, 6), nn.Parameter(torch.zeros(6))
        nn.init.zeros_(self.gate.weight)
        self.double()

    def forward(self, x):
        h = self.first(x)
        given = h if self.first.left is None or self.variant != "left" else h.detach() + self.first.left
        aside = self.aside(given)
        h = self.seen(h if self.variant == "left" else aside)
        if self.variant.startswith("closed"):
            left = h.detach() if self.first.left is None else self.first.left
            h = h + (self.gate(left) if self.variant == "closed gate" else self.scale * left)
        if self.variant == "same":
            with torch.no_grad():
                h = self.same(h)  # in evaluation mode that is its input, with a graph
        if self.variant == "cut at times" and bool((x[:, :1] > 0).any()):
            h, aside = h.detach(), aside.detach()
        return self.head(self.last(h) + aside.softmax(-1))


AROUND = [("hook", 2), ("left", 2), ("same", 5), ("cut at times", 5), ("closed gate", 3), ("closed scale", 3)]


@pytest.mark.parametrize(("variant", "share"), AROUND)
def test_what_goes_around_a_module_has_the_cotangent_of_the_whole_model(variant, share, monkeypatch):
    """Its value or cotangent may be another where a segment is run alone, though the value at its end is the same."""
    unchecked(monkeypatch)
    tighten(monkeypatch, share=share)
    model, batch = Around(variant), samples()
    result = grams(model, batch, EACH_ALONE, self_check=False)
    assert result.metadata["route"] == "factored" and result.metadata["passes"] > 1
    assert (result.metadata["segments"] > 1) == (variant in ("same", "cut at times"))
    errors = gram_errors(result.grams, gradient_rows(model, "classification", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


def test_other_calls_than_those_of_the_outline_end_the_pass():
    h = torch.zeros(1, 7, 5, requires_grad=True)
    noted = ModuleCall(
        name="a", began=0, ended=0, others=0, uses={}, uses_until=0, bytes_until=0, returned=returned_by(h)
    )
    outline = outline_of([noted], lambda call: 0, 0, None)
    for name, result in (("b", h), ("a", None), ("a", (h, h))):
        recorder = _taps.Recorder({}, Directions(way=Way(outline=outline)))
        with pytest.raises(Reached):
            recorder.answer(name, lambda result=result: result)
        assert recorder.recording.astray
    assert Outline().playable == [] and [one.rank for one in outline.playable] == [0]


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
