"""Segments: where a model is divided, each is run alone, and all together give the same Grams."""

from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import gradient_rows, gram_errors
from passes import grams
from tight import tighten, unchecked
from torch import nn
from torch.testing import assert_close
from towers import Tower, samples
from zoo import CASES, build

import fisherfunc as ff
from fisherfunc.gradients.capture.calls import Outline
from fisherfunc.gradients.capture.segments import WHOLE, Segments
from fisherfunc.gradients.factored import divide
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.gradients.factored.groups import grouped, held_by, passed_by
from fisherfunc.gradients.factors.contract import Holder

UNDIVIDED = {"multihead": "one block, which its input goes around"}

EACH_ALONE = ff.losses.each_alone(ff.losses.classification())  # what a batch holds decides for all of it


@pytest.mark.parametrize("name", CASES)
def test_segments_give_what_a_loop_of_backward_passes_gives(name, monkeypatch):
    tighten(monkeypatch, share=4)
    case = CASES[name]
    model, batch = build(name, dtype=torch.float64)
    result = grams(model, batch, case.kind, chunk_size=2, self_check=True)
    assert result.metadata["passes"] > 1
    assert (result.metadata["segments"] > 1) == (name not in UNDIVIDED)
    tolerance = 1e-5 if case.casts else 1e-10
    errors = gram_errors(result.grams, gradient_rows(model, case.kind, batch), floor=torch.finfo(torch.float64).eps)
    assert max(errors.values()) < tolerance, {n: e for n, e in errors.items() if e >= tolerance}


class Block(nn.Module):
    """A residual block; `seen` is told of backward passes through it."""

    def __init__(self, seen):
        super().__init__()
        self.inner, self.seen = nn.Linear(6, 6), seen

    def forward(self, h):
        h = h + self.inner(h).softmax(-1)
        if h.requires_grad:
            h.register_hook(lambda _: self.seen())
        return h


@pytest.mark.parametrize("variant", ["plain", "bypassed", "at times", "overwritten", "without batch axis"])
def test_a_model_is_cut_only_where_nothing_bypasses_the_cut(variant, monkeypatch):
    tighten(monkeypatch, share=5)
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    monkeypatch.setattr(divide, "stack_width", lambda *_: 1)
    model, batch = Tower(variant), samples()
    result = grams(model, batch, EACH_ALONE)
    assert result.metadata["segments"] > 1
    errors = gram_errors(result.grams, gradient_rows(model, "classification", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


class Gated(nn.Module):
    """Layers of samples; `variant` says what the last sequences alone do, if anything."""

    def __init__(self, variant):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 12) for _ in range(4))
        self.first, self.mix, self.out, self.head = (nn.Linear(6, size) for size in (6, 6, 6, 3))
        self.variant = variant
        self.double()

    def forward(self, x):
        positive = bool((x[:, :1] > 0).any())
        first = self.first(x)
        mixed = self.mix(first).softmax(-1)
        if self.variant == "once more at times" and positive:
            mixed = self.mix(3 * mixed).softmax(-1)
        h = first + self.out(mixed).softmax(-1)
        for layer in self.layers:
            value, gate = layer(h).chunk(2, dim=-1)
            value = value.double()  # as it was: now a function that is seen has returned it
            if self.variant == "second output at times" and not positive:
                gate = gate.detach()
            h = 3 * (value * gate.sigmoid()).softmax(-1)
        return self.head(h)


@pytest.mark.parametrize("variant", ["second output", "second output at times", "once more at times"])
def test_no_cotangent_is_lost_where_the_check_of_a_few_tokens_does_not_see_it(variant, monkeypatch):
    unchecked(monkeypatch)
    model, batch = Gated(variant), samples()
    result = grams(model, batch, EACH_ALONE)
    assert (result.metadata["segments"] > 1) == (variant != "once more at times")  # another outline
    errors = gram_errors(result.grams, gradient_rows(model, "classification", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


def test_all_groups_together_come_down_once(monkeypatch):
    unchecked(monkeypatch)
    counts = []
    for segments_of in (plans.segments_of, lambda *_, **__: WHOLE):
        monkeypatch.setattr(plans, "segments_of", segments_of)
        seen = []
        blocks = [Block(partial(seen.append, number)) for number in range(4)]
        model = nn.Sequential(*blocks, nn.Linear(6, 3)).double()
        result = grams(model, samples(), "classification", chunk_size=1)
        assert result.metadata["passes"] >= 4
        counts.append(Counter(seen))
    divided, undivided = counts
    samples_passed = len(samples()[0])
    assert max(divided.values()) - min(divided.values()) < samples_passed  # no block is passed over once more
    assert undivided[3] - divided[3] >= 2 * samples_passed


class Leaking(Tower):
    """What its first block gives reaches the output past every cut: at times its value, or gradient; or neither yet."""

    def __init__(self, variant):
        super().__init__(variant)
        self.gate = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        first = self.blocks[0](x)[:, :3]
        h = super().forward(x)
        if self.variant == "gate":  # closed, so that no value shows what its gradient is made of
            return h + self.gate * first.detach()
        if not bool((x[:, :1] > 0).any()):
            return h
        return h + first.detach() if self.variant == "value" else h + first - first.detach()


@pytest.mark.parametrize("variant", ["value", "gradient", "gate"])
def test_what_goes_past_a_floor_is_seen_where_the_check_of_a_few_tokens_does_not_see_it(variant, monkeypatch):
    unchecked(monkeypatch)
    model, batch = Leaking(variant), samples()
    result = grams(model, batch, EACH_ALONE)
    assert (result.metadata["segments"] > 1) == (variant != "gradient")  # which leaves no cut, as the probe sees
    errors = gram_errors(result.grams, gradient_rows(model, "classification", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("ids", ["all", "one too few"])
def test_of_a_tied_output_layer_only_what_is_looked_up_is_kept(ids, monkeypatch):
    tighten(monkeypatch, share=4)
    model, batch = build("gpt2", dtype=torch.float64)
    kept, settle = [], Holder.settle

    def settled(self, found, *, dtype):
        found = found if ids == "all" else found[1:]
        kept.append(found.tolist())
        settle(self, found, dtype=dtype)

    monkeypatch.setattr(Holder, "settle", settled)
    result = grams(model, batch, "causal_lm", chunk_size=2)
    looked_up = batch["input_ids"].unique().tolist()
    assert (
        kept and all(set(found) <= set(looked_up) for found in kept) and max(map(len, kept)) < model.config.vocab_size
    )
    assert (result.metadata["segments"] > 1) == (ids == "all")
    errors = gram_errors(result.grams, gradient_rows(model, "causal_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


def test_cotangents_that_are_lost_are_computed_again(tmp_path, monkeypatch):
    tighten(monkeypatch, share=5)
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, batch = Tower(), samples()
    expected = grams(model, batch, "classification")
    stopped = []

    def stop(done, total):
        stopped.append(done)
        if done > 0.5 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grams(model, batch, "classification", checkpoint=tmp_path, progress=stop)
    kept = list(tmp_path.glob("cotangents-*"))
    assert kept
    for file in kept:
        file.write_bytes(b"damaged")
    found = grams(model, batch, "classification", checkpoint=tmp_path)
    for name, gram in expected.grams.items():
        assert_close(found.grams[name], gram, rtol=1e-12, atol=1e-14)
    assert not list(tmp_path.glob("cotangents-*"))


SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 9), min_size=1)


@given(held=SIZES, budget=st.integers(1, 30), data=st.data())
def test_every_use_is_in_one_group_and_groups_go_down(held, budget, data):
    count = data.draw(st.integers(1, 4))
    uses = {name: data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2)) for name in held}
    of = {(name, number): level for name, where in uses.items() for number, level in enumerate(sorted(where))}
    segments = Segments(outline=Outline(), ends=tuple(reversed(range(count - 1))), of=of)
    groups, too_large = grouped(held, list(held), budget, segments)
    items = Counter(item for group in groups for item in group.items)
    assert items == Counter((n, level) for n, where in uses.items() if n not in too_large for level in where)
    assert too_large == [name for name in held if held[name] > budget]
    top = min((level for _, level in items), default=0)  # what lies above it has no parameters, and is part of it
    for number, (group, following) in enumerate(pairwise(groups)):
        first = min(level for _, level in group.items)
        assert group.start == (0 if first == top else first) <= following.start
        last, goes_on = passed_by(groups, number, segments)
        assert goes_on == (following.start > group.start)
        assert max(segment for _, segment in group.items) <= last and (last < following.start or not goes_on)
    if all(len(where) == 1 for where in uses.values()):
        assert max(held_by(groups, held), default=0) <= budget


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_what_is_held_is_counted_for_the_slots_that_are_asked_for(chunk_size, monkeypatch):
    """Longer prefixes hold more: fewer slots than are asked for would promise too small a peak."""
    tighten(monkeypatch, share=4)
    tried, divided = [], divide._divided

    def counted(needs, segments, whole, slots, *others):
        tried.append(slots)
        return divided(needs, segments, whole, slots, *others)

    monkeypatch.setattr(divide, "_divided", counted)
    model, batch = build("gpt2", dtype=torch.float64)
    plan = grams(model, batch, CASES["gpt2"].kind, chunk_size=chunk_size).metadata
    assert plan["segments"] > 1
    assert set(tried) == {3} if chunk_size else len(set(tried)) > 1
