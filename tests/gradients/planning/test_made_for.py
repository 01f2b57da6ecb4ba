"""A plan is a value: it runs on any batch of the same shapes, discovers nothing again, and is refused for others."""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.factored import route as factored
from fisherfunc.gradients.planning.made_for import PlanMismatchError
from fisherfunc.gradients.survey import readings, survey
from fisherfunc.pipeline import fisher
from fisherfunc.surface import recorder

LIMIT = 10**9


def classifier(samples=20, *, seed=0, classes=3, width=5):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    return model, (torch.randn(samples, width, generator=generator).double(), torch.arange(samples) % classes)


def another(batch):
    """A batch of the same shapes and the same tokens: other numbers, other ids."""
    if isinstance(batch, dict):
        ids = {k: v for k, v in batch.items() if k.endswith("ids") or k == "labels"}
        return batch | {k: torch.where((v > 0) & (v < 30), v % 29 + 1, v) for k, v in ids.items()}
    return tuple(1.5 * leaf.flip(0) if leaf.is_floating_point() else leaf.roll(1) for leaf in batch)


def test_a_plan_takes_all_that_a_run_takes():
    run, plan = (set(inspect.signature(function).parameters) for function in (ff.fisher_spectrum, ff.plan))
    assert run - plan == {"plan", "sketch"}  # a sketch is made without a plan, and says so
    assert plan - run == {"calibrate", "pilot", "rates"}


def undiscovered(monkeypatch):
    """From here on whoever looks at the model to decide something fails."""

    def again(*args, **options):
        raise AssertionError("discovered again")

    places = {factored: ["plan_factored", "tried"], fisher: ["inferred_loss"], survey: ["_looked_at", "_check_again"]}
    places |= {readings: ["_with_axis"]}
    for module, names in places.items():
        for name in names:
            monkeypatch.setattr(module, name, again)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {}),
        ("gpt2", {}),
        ("llama", {}),
        ("bert", {}),
        ("t5", {}),
        ("gpt2", {"unit": "sequence"}),
        ("gpt2", {"num_tokens": 4, "blocks": ff.by_module}),
        ("mlp", {"targets": ff.targets.sampled(num_draws=2)}),
        ("mlp", {"targets": ff.targets.all_classes()}),
        ("mlp", {"route": "dense"}),
        ("mlp", {"max_coordinates": 7}),
    ],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_another_batch_of_the_same_shapes_has_its_own_spectrum_and_nothing_is_discovered(monkeypatch, name, options):
    model, batch = build(name, dtype=torch.float64)
    other = another(batch)
    want = ff.fisher_spectrum(model, other, memory_limit=LIMIT, **options)
    plan = ff.plan(model, batch, memory_limit=LIMIT, calibrate=False, **options)
    undiscovered(monkeypatch)
    found = ff.fisher_spectrum(model, other, memory_limit=LIMIT, plan=plan, **options)
    scale = float(want.full.eigenvalues[0])
    assert_close(found.full.eigenvalues, want.full.eigenvalues, atol=1e-12 * scale, rtol=0)
    assert list(found.blocks) == list(want.blocks)
    assert found.metadata["self_check"]["held"] and found.metadata["plan_given"] and not want.metadata["plan_given"]
    assert found.metadata["route"] == want.metadata["route"] == plan.route
    assert found.metadata["loss"] == want.metadata["loss"] and found.metadata["tokens"] == want.metadata["tokens"]


class SeesLargeLabels(nn.Module):
    """Labels change its predictions where they are large, and nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.double()

    def forward(self, input_ids, labels=None):
        hidden = self.table(input_ids)
        if labels is not None:
            hidden = hidden + (labels > 5)[..., None] * self.table(labels.clamp(min=0)).tanh()
        return self.head(hidden)


class SeesNone(SeesLargeLabels):
    """The same without labels."""

    def forward(self, input_ids):
        return super().forward(input_ids)


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_labels_that_changed_nothing_in_the_batch_of_a_plan_may_in_another(route):
    torch.manual_seed(0)
    model, ids = SeesLargeLabels(), torch.randint(9, (5, 4))
    plain, other = ({"input_ids": ids, "labels": ids % 9 if large else ids.clamp(max=5)} for large in (False, True))
    how = {"loss": ff.losses.masked_lm(), "route": route}
    plan = ff.plan(model, plain, calibrate=False, **how)
    want = ff.fisher_spectrum(model, other, **how).full.eigenvalues
    without = SeesNone()
    without.load_state_dict(model.state_dict())
    assert not torch.allclose(want, ff.fisher_spectrum(without, other, **how).full.eigenvalues, rtol=1e-3)
    assert_close(ff.fisher_spectrum(model, other, plan=plan, **how).full.eigenvalues, want)


def test_what_does_not_touch_the_pass_may_differ(tmp_path):
    model, batch = classifier()
    plan = ff.plan(model, batch, calibrate=False)
    free = {
        "kernel": ff.kernels.gram_svd(),
        "center": True,
        "intervals": "jackknife",
        "population": False,
        "checkpoint": tmp_path / "folder",
        "progress": lambda done, total: None,
        "loss": ff.losses.classification(),
    }
    found = ff.fisher_spectrum(model, batch, plan=plan, **free)
    want = ff.fisher_spectrum(model, batch, **{k: v for k, v in free.items() if k != "checkpoint"})
    assert found.metadata["centered"] and set(found.metadata["solver"].values()) == {"gram_svd(float64)"}
    assert found.intervals is not None and found.population is None
    assert_close(found.full.eigenvalues, want.full.eigenvalues, atol=1e-12 * float(want.full.eigenvalues[0]), rtol=0)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"blocks": ff.by_parameter}, r"blocks \(2: \w+ in the plan, 4: \w+ here\)"),
        ({"unit": "sequence"}, r"unit \(token in the plan, sequence here\)"),
        ({"num_tokens": 5}, r"num_tokens \(None in the plan, 5 here\)"),
        ({"seed": 1}, r"seed \(0 in the plan, 1 here\)"),
        ({"route": "dense"}, r"route \(factored in the plan, dense here\)"),
        ({"targets": ff.targets.sampled(num_draws=2)}, r"targets \(observed in the plan, sampled"),
        ({"memory_limit": LIMIT}, rf"memory_limit \(None in the plan, {LIMIT} here\)"),
        ({"chunk_size": 3}, r"chunk_size \(None in the plan, 3 here\)"),
        ({"self_check": False}, r"self_check \(True in the plan, False here\)"),
        ({"drop_nonfinite": True}, r"drop_nonfinite \(False in the plan, True here\)"),
        ({"max_coordinates": 4}, r"max_coordinates \(none in the plan, \w+ here\)"),
        ({"dtype": torch.float32}, r"parameter '0\.weight' \(\(8, 5\) float64 in the plan, \(8, 5\) float32 here\)"),
        ({"parameters": ["2.*"]}, r"parameter '0\.weight' \(\(8, 5\) float64 in the plan, none here\)"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, r"loss \(classification, shift 0, "),
    ],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_another_option_is_refused_by_name(changed, named):
    model, batch = classifier()
    plan = ff.plan(model, batch, calibrate=False)
    calls = []
    with pytest.raises(PlanMismatchError, match=f"the plan was made for something else: .*{named}"):
        ff.fisher_spectrum(model, batch, plan=plan, progress=lambda *done: calls.append(done), **changed)
    assert not calls


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (classifier(samples=21), r"batch 0\[0\] \(\(20, 5\) float64 in the plan, \(21, 5\) float64 here\)"),
        (classifier(width=6), r"parameter '0\.weight' \(\(8, 5\)"),
        ((nn.Linear(5, 3).double(), classifier()[1]), r"model \(Sequential in the plan, Linear here\)"),
    ],
    ids=["samples", "parameters", "model"],
)
def test_another_shape_is_refused_by_name(other, named):
    plan = ff.plan(*classifier(), calibrate=False)
    with pytest.raises(PlanMismatchError, match=f"the plan was made for something else: .*{named}.* ff.plan"):
        ff.fisher_spectrum(*other, plan=plan)


def test_a_plan_has_room_for_as_many_tokens_and_for_fewer():
    model, batch = build("gpt2", dtype=torch.float64)
    fewer = {**batch, "labels": batch["labels"].clone()}
    fewer["labels"][:, -1] = -100
    want = ff.fisher_spectrum(model, fewer)
    found = ff.fisher_spectrum(model, fewer, plan=ff.plan(model, batch, calibrate=False))
    assert_close(found.full.eigenvalues, want.full.eigenvalues, atol=1e-12 * float(want.full.eigenvalues[0]), rtol=0)
    with pytest.raises(PlanMismatchError, match=r"made for \d+ tokens, and this batch has \d+: .* batch that has most"):
        ff.fisher_spectrum(model, batch, plan=ff.plan(model, fewer, calibrate=False))


def test_the_plan_of_a_run_that_is_done_is_none_to_run():
    model, batch = classifier()
    plan = ff.plan(model, batch, calibrate=False)
    with pytest.raises(ValueError, match=r"plan= expected one that ff\.plan made"):
        ff.fisher_spectrum(model, batch, plan=ff.RunPlan(**{**vars(plan), "made_for": None}))


class ByInput(nn.Module):
    """A causal model, but where a batch has a large first id: then later places are seen as well."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20)

    def forward(self, input_ids):
        x = self.inner(self.embedding(input_ids))
        seen = x.mean(1, keepdim=True) if bool(input_ids[0, 0] >= 10) else x.cumsum(1)
        return self.head(torch.tanh(x + seen))


def test_what_a_plan_exploits_and_a_batch_does_not_allow_is_given_up():
    torch.manual_seed(0)
    model, ids = ByInput().double(), torch.randint(10, (3, 8))
    plan = ff.plan(model, {"input_ids": ids, "labels": ids}, loss=ff.losses.causal_lm(), calibrate=False)
    assert plan.of_route.structure.causal
    odd = {"input_ids": ids + 10, "labels": ids + 10}
    found = ff.fisher_spectrum(model, odd, plan=plan)
    want = ff.fisher_spectrum(model, odd, loss=ff.losses.causal_lm(), route="dense")
    assert_close(found.full.eigenvalues, want.full.eigenvalues, atol=1e-11 * float(want.full.eigenvalues[0]), rtol=0)
    assert found.metadata["self_check"]["held"]


class Meeting(nn.Module):
    """A classifier whose samples meet where one is large."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0) if bool(x.max() > 100) else x)


@pytest.mark.parametrize("samples", [6, 40])
@pytest.mark.parametrize("self_check", [True, False])
def test_samples_that_meet_in_another_batch_are_seen(samples, self_check):
    torch.manual_seed(0)
    model, x, y = Meeting().double(), torch.randn(samples, 5).double(), torch.arange(samples) % 3
    plan = ff.plan(model, (x, y), self_check=self_check, calibrate=False)
    apart = x + 200 * torch.eye(samples, 5).double()
    with pytest.raises(ValueError, match="depend on each other"):
        ff.fisher_spectrum(model, (apart, y), self_check=self_check, plan=plan)


def test_a_recorder_looks_at_the_model_once(monkeypatch):
    model, batch = classifier()
    record, made = ff.SpectrumRecorder(batch, every=1), []
    plan = recorder.plan
    monkeypatch.setattr(recorder, "plan", lambda *args, **options: made.append(options) or plan(*args, **options))
    for step in range(3):
        record(model, step)
        want = ff.fisher_spectrum(model, batch).full.eigenvalues
        assert_close(record.results[step].full.eigenvalues, want, atol=1e-12 * float(want[0]), rtol=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert len(made) == 1
    model[1] = nn.Linear(8, 8).double()  # another model: another look, and no error
    assert record(model, 3).full.num_params == sum(p.numel() for p in model.parameters()) and len(made) == 2
