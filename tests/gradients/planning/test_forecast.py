"""Plans: what is said before a run is what the run then does, and its figures behave as they must. Nothing is timed."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from plans import language, planned, settings
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.factored.estimate import spans_of
from fisherfunc.gradients.planning import forecast
from fisherfunc.linalg.grams.token_grams import Tokens
from fisherfunc.runtime.grain import CPU

planning = import_module("fisherfunc.pipeline.plan")  # `plan` is the function, too


def classifier(samples=30):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, (torch.randn(samples, 5), torch.arange(samples) % 3)


def images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))
    return model, (torch.randn(6, 1, 8, 8), torch.arange(6) % 3)


class Odd(nn.Module):
    """A classifier whose largest weight is used in a way that no rule knows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 160)
        self.weight = nn.Parameter(torch.randn(160, 160) / 10)
        self.outer = nn.Linear(160, 3)

    def forward(self, inputs):
        return self.outer(torch.tanh(self.inner(inputs) @ self.weight.sin()))


def odd():
    torch.manual_seed(0)
    return Odd(), classifier()[1]


CASES = {
    "causal": ({}, language),
    "limited": ({"memory_limit": 2_500_000}, lambda: language(4, length=24)),
    "chunks": ({"chunk_size": 3}, language),
    "few tokens": ({"num_tokens": 7, "seed": 1}, language),
    "sequences": ({"unit": "sequence"}, language),
    "dense": ({"route": "dense"}, language),
    "dense, limited": ({"route": "dense", "memory_limit": 2_400_000}, lambda: odd()),
    "slabs": ({"memory_limit": 2_200_000}, lambda: odd()),
    "some parameters": ({"parameters": ["head.*", "norm.*"]}, language),
    "one block": ({"blocks": ff.whole}, language),
    "samples": ({}, classifier),
    "images": ({}, images),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_the_run_then_reports(case):
    options, make = CASES[case]
    model, batch = make()
    plan = planned(model, batch, **options).to_dict()
    facts = ff.fisher_spectrum(model, batch, **settings(model), **options).metadata
    ran = dict(facts["plan"])
    if "memory_limit" not in options:  # half of what is free, at the time
        ran["memory_limit"] = plan["memory_limit"]
    assert ran == plan
    assert (facts["route"], facts["passes"], facts["chunk_size"]) == (
        plan["route"],
        plan["num_passes"],
        plan["chunk_size"],
    )
    assert facts["num_tokens"] == plan["num_units"]
    assert {name for group in plan["groups"] for name in group} == set(plan["parameters"])


def test_the_reasons_are_those_of_the_route():
    model, batch = language()
    found = planned(model, batch).parameters
    assert found["head.weight"].route == "output layer"
    assert found["norm.bias"].route == "elementwise"
    assert (found["angle"].route, found["angle"].why) == ("autograd", "used by sin")
    formed = ff.fisher_spectrum(model, batch, **settings(model)).metadata["formed_parameters"]
    assert {name for name, cost in found.items() if {"rows", "autograd"} & set(cost.route.split("+"))} == set(formed)
    assert {cost.route for cost in planned(*classifier()).parameters.values()} == {
        "points",
        "elementwise",
        "output layer",
    }
    assert {cost.route for cost in planned(model, batch, route="dense").parameters.values()} == {"dense"}


def test_a_tensor_too_large_for_the_limit_is_planned_by_slabs():
    model, batch = odd()
    plan = planned(model, batch, memory_limit=2_200_000)
    assert (plan.route, plan.parameters["weight"].route) == ("factored", "slabs")
    assert "memory limit" in plan.parameters["weight"].why
    run = ff.fisher_spectrum(model, batch, memory_limit=2_200_000).metadata
    assert run["slabbed_parameters"] == ["weight"]
    assert run["passes"] == plan.num_passes > 2


def work(plan, slots):
    """Backward and forward passes a token: over segments, down once for all groups, and something for each of them."""
    count, longer = plan.num_passes, 1 + plan.chunk_size / slots
    if plan.num_segments > 1:
        return longer + (CPU.forward + CPU.repeated * count) / plan.chunk_size
    return longer * (count + 1) / 2 + CPU.forward * count / plan.chunk_size


def test_more_memory_never_takes_more_work_and_the_limit_is_kept():
    model, batch = language(4, length=24)
    most = planned(model, batch, memory_limit=10**9).peak_bytes
    plans = []
    for step in range(60):
        limit = int(2 * most * 0.95**step)
        try:
            plan = planned(model, batch, memory_limit=limit)
        except ValueError:  # below what the dense route needs for a tensor that is too large here
            break
        plans.append(plan)
        assert plan.route == "factored" and plan.peak_bytes <= limit
    works = [work(plan, slots=23) for plan in plans]
    assert works == sorted(works)
    assert plans[0].num_passes == 1 and plans[-1].num_passes > 2
    assert any(plan.num_segments > 1 for plan in plans)


def test_operations_grow_as_they_must():
    model, batch = language(4)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
    one, two = planned(model, batch), planned(model, twice)
    assert two.num_units == 2 * one.num_units
    for key, factor in (("forward", 2), ("backward", 2), ("contraction", 4), ("eigensolve", 8)):
        assert two.operations[key] == pytest.approx(factor * one.operations[key], rel=1e-12)
    assert two.peak_bytes > one.peak_bytes


@pytest.mark.parametrize("kind", ["language", "classifier"])
def test_sums_over_parameters_are_those_of_the_run(kind):
    plan = planned(*(language() if kind == "language" else classifier()))
    for key in ("forward", "backward", "contraction"):
        assert plan.operations[key] == sum(getattr(cost, key) for cost in plan.parameters.values())
    assert plan.num_params == sum(cost.num_params for cost in plan.parameters.values())


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_spans_count_every_token_on_the_prefix_of_its_chunk(chunk):
    sequence = torch.tensor([0] * 5 + [2] * 3)
    position = torch.tensor([0, 1, 2, 4, 7, 1, 2, 3])
    tokens = Tokens(sequence=sequence, position=position, loss=torch.zeros(8))
    forward, backward = 2.0, 0.0
    for member in (0, 2):
        mine = position[sequence == member].tolist()
        for first in range(0, len(mine), chunk):
            rows = mine[first : first + chunk]
            forward += (max(rows) + 1) / 8 if max(rows) < 7 else 0  # the pass over the whole sequence is there
            backward += len(rows) * (max(rows) + 1) / 8
    found = spans_of(tokens, chunk, causal=True)
    assert (found.forward, found.backward) == (pytest.approx(forward), pytest.approx(backward))
    assert spans_of(tokens, chunk, causal=False).backward == 8


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_a_calibrated_plan_has_seconds_for_every_step(route):
    model, batch = language()
    plan = ff.plan(model, batch, route=route, **settings(model))
    steps = {"preparation", "passes", "contraction", "eigensolve"}
    assert set(plan.seconds) == {*steps, "total"}
    assert all(seconds > 0 for seconds in plan.seconds.values())
    assert plan.seconds["total"] == pytest.approx(sum(plan.seconds[step] for step in steps))
    assert replace(plan, seconds={}, rates={}).to_dict() == planned(model, batch, route=route).to_dict() | {
        "memory_limit": plan.memory_limit
    }


def test_a_model_that_the_route_is_not_for_is_planned_densely_with_the_reason(monkeypatch):
    def unfit(*args, **kwargs):
        raise forecast.NotFactorable("not this one")

    monkeypatch.setattr(forecast, "planned", unfit)
    plan = planned(*classifier())
    assert (plan.route, plan.reason) == ("dense", "not this one")


def test_the_model_is_left_as_it_was_and_nothing_is_passed_over():
    model, batch = classifier()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planned(model, batch)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"route": "fast"}, ValueError, "route expected one of"),
        ({"unit": "word"}, ValueError, "unit expected"),
        ({"memory_limit": 10}, ValueError, "is below the"),
        ({"num_tokens": 0}, ValueError, "num_tokens expected at least 1"),
        ({"chunk_size": -1}, ValueError, "chunk_size expected at least 1"),
        ({"parameters": ["none"]}, ValueError, "none"),
    ],
)
def test_bad_input_is_refused_as_the_run_refuses_it(options, error, message):
    model, batch = classifier()
    with pytest.raises(error, match=message):
        planned(model, batch, **options)
    with pytest.raises(error, match=message):
        ff.fisher_spectrum(model, batch, **options)


def test_the_outcome_says_what_the_run_took():
    facts = ff.fisher_spectrum(*classifier()).metadata
    assert facts["outcome"]["seconds"] == facts["pass_time_s"] > 0
    assert facts["outcome"]["peak_bytes"] is None or facts["outcome"]["peak_bytes"] > 0


def test_a_plan_survives_json_and_the_file_of_grams(tmp_path):
    model, batch = language()
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm())
    grams.save(tmp_path / "grams.safetensors")
    assert ff.TokenGrams.load(tmp_path / "grams.safetensors").metadata["plan"] == grams.metadata["plan"]
    plan = planned(model, batch).to_dict()
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan


@pytest.mark.parametrize(("num_units", "square", "cube"), [(5120, 4e-8, 2e-11), (5120, 0.0, 2e-11), (300, 4e-8, 2e-11)])
def test_seconds_of_an_eigensolve_are_those_of_two_solves_carried_on(num_units, square, cube, monkeypatch):
    monkeypatch.setattr(planning, "_solving_seconds", lambda size, *_: square * size**2 + cube * size**3)
    rate = planning._eigensolve_rate(num_units, torch.float64, torch.device("cpu"))
    assert 4 / 3 * num_units**3 / rate == pytest.approx(square * num_units**2 + cube * num_units**3, rel=1e-9)


def test_noise_never_makes_an_eigensolve_grow_with_the_square_alone(monkeypatch):
    monkeypatch.setattr(planning, "_solving_seconds", lambda size, *_: 0.03 if size == planning.SOLVED else 0.02)
    rate = planning._eigensolve_rate(10 * planning.SOLVED, torch.float64, torch.device("cpu"))
    seconds = 4 / 3 * (10 * planning.SOLVED) ** 3 / rate
    assert seconds == pytest.approx(0.03 * (0.875 * 10**2 + 0.125 * 10**3))
