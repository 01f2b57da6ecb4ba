"""Cuts: where a model is cut, later passes start there, and give the same Grams; elsewhere it is not cut."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import gradient_rows, gram_errors
from test_factored import grams
from tight import tighten
from torch import nn
from torch.testing import assert_close
from zoo import CASES, build

import fisherfunc as ff
from fisherfunc.gradients.factored import divide
from fisherfunc.gradients.factored import plan as plans
from fisherfunc.gradients.factored import route as factored
from fisherfunc.gradients.factored.contract import Holder
from fisherfunc.gradients.factored.cuts import Levels
from fisherfunc.gradients.factored.groups import grouped, held_by, leg_of

UNCUT = {
    "mixtral": "which experts are called differs from prefix to prefix",
    "cnn": "it has one layer below the last",
    "multihead": "one block, which its input goes around",
}

EACH_ALONE = ff.losses.each_alone(ff.losses.classification())  # what a batch holds decides for all of it


@pytest.mark.parametrize("name", CASES)
def test_passes_from_cuts_give_what_a_loop_of_backward_passes_gives(name, monkeypatch):
    tighten(monkeypatch, share=4)
    case = CASES[name]
    model, batch = build(name, dtype=torch.float64)
    result = grams(model, batch, case.kind, chunk_size=2, self_check=True)
    assert result.metadata["passes"] > 1
    assert (result.metadata["passes_from_cuts"] > 0) == (name not in UNCUT)
    tolerance = 1e-5 if case.casts else 1e-10
    errors = gram_errors(result.grams, gradient_rows(model, case.kind, batch), floor=torch.finfo(torch.float64).eps)
    assert max(errors.values()) < tolerance, {n: e for n, e in errors.items() if e >= tolerance}


class Tower(nn.Module):
    """Residual blocks of samples; `variant` says what bypasses them, if anything; `seen` is told of backward passes."""

    def __init__(self, variant="plain", seen=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)
        self.variant, self.seen = variant, seen
        self.double()

    def forward(self, x):
        first = h = self.blocks[0](x[0] if self.variant == "without batch axis" else x)
        for index, block in enumerate(self.blocks[1:], 1):
            if self.variant == "overwritten":
                h = h * 1.0
                h += block(h.clone()).softmax(-1)
            else:
                h = h + block(h).softmax(-1)  # not elementwise, or backward passes would skip it
            if h.requires_grad and self.seen is not None:
                h.register_hook(lambda _, index=index: self.seen(index))
        if self.variant == "bypassed" or (self.variant == "at times" and bool((x[:, :1] > 0).any())):
            h = h + first
        return self.head(torch.tanh(h)).view(-1, 3)


def unchecked(monkeypatch):
    """Many groups of factors, samples one by one (stacks have passes of their own), no check of a few tokens."""
    tighten(monkeypatch, share=5)
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    monkeypatch.setattr(factored, "tried", lambda *_, **__: None)
    monkeypatch.setattr(divide, "stack_width", lambda *_: 1)


def samples():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    x[:5, 0] = -x[:5, 0].abs()
    x[5:, 0] = x[5:, 0].abs()
    return x, torch.arange(9) % 3


@pytest.mark.parametrize("variant", ["plain", "bypassed", "at times", "overwritten", "without batch axis"])
def test_a_model_is_cut_only_where_nothing_bypasses_the_cut(variant, monkeypatch):
    tighten(monkeypatch, share=5)
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    monkeypatch.setattr(divide, "stack_width", lambda *_: 1)
    model, batch = Tower(variant), samples()
    result = grams(model, batch, EACH_ALONE)
    assert (result.metadata["passes_from_cuts"] > 0) == (variant not in ("bypassed", "at times"))
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
    assert result.metadata["passes"] > 1 and (result.metadata["passes_from_cuts"] > 0) == (variant == "second output")
    errors = gram_errors(result.grams, gradient_rows(model, "classification", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


def test_all_groups_together_come_down_once(monkeypatch):
    unchecked(monkeypatch)
    counts = []
    for levels in (plans.levels_of, lambda *_, **__: Levels()):
        monkeypatch.setattr(plans, "levels_of", levels)
        seen = []
        result = grams(Tower(seen=seen.append), samples(), "classification", chunk_size=1)
        assert result.metadata["passes"] >= 4
        counts.append(Counter(seen))
    with_cuts, without = counts
    assert (
        min(with_cuts.values()) >= 9 and max(with_cuts.values()) <= 24
    )  # once in the pass, once in the survey, and few
    assert without[3] > 2 * with_cuts[3]


def test_no_linear_map_below_the_floor_of_a_pass_is_computed(monkeypatch):
    unchecked(monkeypatch)
    monkeypatch.setattr(plans, "skippable", lambda *_: [])
    inputs = []  # of the second block: NaN where the first one was not computed
    model, batch = Tower(), samples()
    model.blocks[1].register_forward_pre_hook(lambda _, args: inputs.append(not bool(args[0].isnan().any())))
    result = grams(model, batch, "classification", chunk_size=1)
    assert result.metadata["passes_from_cuts"] >= 3
    honest = Counter(inputs)[True] / len(batch[0])
    assert Counter(inputs)[False] >= 2 * len(batch[0])
    assert honest < result.metadata["passes"]


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
    assert result.metadata["passes"] > 1 and not result.metadata["passes_from_cuts"]
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
    assert (result.metadata["passes_from_cuts"] > 0) == (ids == "all")
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
    assert not list(tmp_path.glob("cotangents-*")) and not list(tmp_path.glob("pieces-*"))


SIZES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 9), min_size=1)


@given(held=SIZES, budget=st.integers(1, 30), data=st.data())
def test_every_use_is_in_one_group_and_groups_go_down(held, budget, data):
    count = data.draw(st.integers(1, 4))
    uses = {name: data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2)) for name in held}
    of = {(name, number): level for name, where in uses.items() for number, level in enumerate(sorted(where))}
    levels = Levels(cuts=tuple((str(k), 0, 1) for k in range(count - 1)), of=of)
    groups, too_large = grouped(held, list(held), budget, levels)
    items = Counter(item for group in groups for item in group.items)
    assert items == Counter((n, level) for n, where in uses.items() if n not in too_large for level in where)
    assert too_large == [name for name in held if held[name] > budget]
    for number, (group, following) in enumerate(pairwise(groups)):
        assert group.start == min(level for _, level in group.items) <= following.start
        assert max(level for _, level in group.items) <= following.start or leg_of(groups, number, levels).end
    if all(len(where) == 1 for where in uses.values()):
        assert max(held_by(groups, held), default=0) <= budget


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_what_is_held_is_counted_for_the_slots_that_are_asked_for(chunk_size, monkeypatch):
    """Longer prefixes hold more: fewer slots than are asked for would promise too small a peak."""
    tighten(monkeypatch, share=4)
    tried, divided = [], divide._from_cuts

    def counted(needs, levels, plain, slots, share):
        tried.append(slots)
        return divided(needs, levels, plain, slots, share)

    monkeypatch.setattr(divide, "_from_cuts", counted)
    model, batch = build("gpt2", dtype=torch.float64)
    plan = grams(model, batch, CASES["gpt2"].kind, chunk_size=chunk_size).metadata
    assert plan["passes_from_cuts"] > 0
    assert set(tried) == {3} if chunk_size else len(set(tried)) > 1
