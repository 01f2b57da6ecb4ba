"""Every architecture against the loop of backward passes, parameter by parameter."""

from contextlib import nullcontext

import pytest
import torch
from grains import TINY
from oracle import gradient_rows, gram_errors, terms
from zoo import CASES, build

import fisherfunc as ff
from fisherfunc.runtime.grain import divided_as


def losses_of(kind: str) -> ff.losses.TokenLoss:
    return getattr(ff.losses, kind)()


def grams_of(model: torch.nn.Module, batch, kind: str, **options) -> ff.TokenGrams:
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, batch, losses_of(kind), **options)


@pytest.mark.parametrize("route", ["dense", "factored", "factored as on a GPU"])
@pytest.mark.parametrize("name", CASES)
def test_float64_grams_equal_those_of_a_loop_of_backward_passes(name, route):
    case = CASES[name]
    model, batch = build(name, dtype=torch.float64)
    rows = gradient_rows(model, case.kind, batch)
    with divided_as(TINY) if route.endswith("GPU") else nullcontext():
        grams = grams_of(model, batch, case.kind, route=route.split()[0], self_check=True)
    # A model that casts to float32 inside does so for the oracle too; what is left is float32 round-off.
    tolerance = 1e-5 if case.casts else 1e-10
    errors = gram_errors(grams.grams, rows, floor=torch.finfo(torch.float64).eps)
    assert max(errors.values()) < tolerance, {n: e for n, e in errors.items() if e >= tolerance}


@pytest.mark.parametrize("route", ["dense", "factored"])
@pytest.mark.parametrize("name", CASES)
def test_float32_grams_equal_those_of_a_float64_loop(name, route):
    case = CASES[name]
    model, batch = build(name)
    grams = grams_of(model, batch, case.kind, route=route)
    exact, exact_batch = build(name, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    errors = gram_errors(
        grams.grams, gradient_rows(exact, case.kind, exact_batch), floor=torch.finfo(torch.float32).eps
    )
    assert max(errors.values()) < 1e-4, {n: e for n, e in errors.items() if e >= 1e-4}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_plain_rule(name):
    case = CASES[name]
    model, batch = build(name)
    tokens = grams_of(model, batch, case.kind, num_tokens=None).tokens
    expected = [(t.sequence, t.position) for t in terms(case.kind, batch)]
    assert list(zip(tokens.sequence.tolist(), tokens.position.tolist(), strict=True)) == expected
