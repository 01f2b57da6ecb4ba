"""What a batch gives to `forward`: by name, by place, and when the targets go along; and parameters by identity."""

import inspect
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fisherfunc as ff
from fisherfunc.models.arguments import arguments, takes_targets

X, Y = torch.ones(2, 3), torch.tensor([0, 1])
InOrder = namedtuple("InOrder", "x labels")
OtherNames = namedtuple("OtherNames", "pixels labels")
Reversed = namedtuple("Reversed", "labels x")
Mixed = namedtuple("Mixed", "pixels x labels")
Unlabelled = namedtuple("Unlabelled", "ids mask")


def module(signature):
    """A module with that signature."""
    space = {}
    exec(f"def forward(self, {signature}): pass", space)
    return type("Made", (nn.Module,), {"forward": space["forward"]})()


CASES = [
    ("x", {"x": X, "labels": Y}, False, ((), {"x": X})),
    ("x, labels", {"x": X, "labels": Y}, False, ((), {"x": X, "labels": Y})),
    ("x, labels=None", {"x": X, "labels": Y}, False, ((), {"x": X})),
    ("x, labels=None", {"x": X, "labels": Y}, True, ((), {"x": X, "labels": Y})),
    ("**inputs", {"x": X, "targets": Y}, False, ((), {"x": X})),
    ("**inputs", {"x": X, "targets": Y}, True, ((), {"x": X, "targets": Y})),
    ("x, mask=None", (X, Y), True, ((X,), {})),
    ("x, target=None", (X, Y), False, ((X,), {})),
    ("x, mask=None, target=None", (X, Y), True, ((X,), {"target": Y})),
    ("x, label", (X, Y), False, ((X,), {"label": Y})),
    ("x, label", (X, Y, Y), False, ((X, Y), {})),
    ("x", InOrder(X, Y), False, ((), {"x": X})),
    ("x", Reversed(Y, X), False, ((), {"x": X})),
    ("x", OtherNames(X, Y), False, ((X,), {})),
    ("x", Unlabelled(X, Y), False, ((X,), {})),
]


@pytest.mark.parametrize(("signature", "batch", "give", "expected"), CASES)
def test_the_arguments_of_a_call(signature, batch, give, expected):
    made = module(signature)
    positional, keywords = arguments(made, batch, inspect.signature(made.forward), give_targets=give)
    assert [id(value) for value in positional] == [id(value) for value in expected[0]]
    assert {name: id(value) for name, value in keywords.items()} == {n: id(v) for n, v in expected[1].items()}


@pytest.mark.parametrize(
    ("signature", "batch", "message"),
    [
        ("pixels", {"x": X, "labels": Y}, r"missing a required argument: 'pixels'\): it gives x; keys of a mapping"),
        ("x", (X, X, Y), r"too many positional arguments\): it gives input 0, input 1"),
        ("x, mask", (X, Y), "missing a required argument: 'mask'"),
        ("x, pixel=None", Mixed(X, X, Y), "by name or by place"),
        ("ids, mask=None", Unlabelled(X, Y), "'mask': its last entry is the targets by place, and an input by name"),
    ],
)
def test_what_forward_does_not_take_is_a_type_error_in_its_names(signature, batch, message):
    made = module(signature)
    with pytest.raises(TypeError, match=message):
        arguments(made, batch, inspect.signature(made.forward))


@pytest.mark.parametrize(
    ("signature", "expected"),
    [("x", "never"), ("x, y=None", "optional"), ("**inputs", "optional"), ("x, target", "required")],
)
def test_how_a_forward_method_takes_targets(signature, expected):
    assert takes_targets(inspect.signature(module(signature).forward)) == expected


def chosen(selection):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return list(ff.functionalize(model, parameters=selection(model)).params)


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (lambda m: list(m.parameters()), ["0.weight", "0.bias", "1.weight", "1.bias"]),
        (lambda m: m.parameters(), ["0.weight", "0.bias", "1.weight", "1.bias"]),
        (lambda m: m[1].parameters(), ["1.weight", "1.bias"]),
        (lambda m: m[1].named_parameters(), ["1.weight", "1.bias"]),
        (lambda m: m[1], ["1.weight", "1.bias"]),
        (lambda m: m[0].bias, ["0.bias"]),
        (lambda m: [m[1].bias, "0.w*"], ["0.weight", "1.bias"]),
    ],
)
def test_parameters_are_chosen_by_identity_too(selection, names):
    assert chosen(selection) == names


_INT = "expected 'trainable', .*got int|typechecking parameter 'parameters'"
"""Ours, or where the tests check the types of all arguments, theirs."""


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (lambda m: [torch.ones(3)], r"got Tensor of shape \(3,\) that is none of the model's"),
        (lambda m: 3, _INT),
        (lambda m: [3], _INT),
    ],
)
def test_what_selects_no_parameter_is_a_type_error(selection, message):
    with pytest.raises(TypeError, match=message):
        chosen(selection)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_weights_that_a_parametrisation_caches_are_computed_anew(route):
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    parametrize.register_parametrization(model, "weight", Symmetric())
    batch = (x, torch.tensor([0, 1, 2, 0]))
    expected = ff.fisher_spectrum(model, batch, route=route).full.eigenvalues
    with parametrize.cached():
        before = model(x)
        got = ff.fisher_spectrum(model, batch, route=route).full.eigenvalues
        with torch.no_grad():
            model.parametrizations.weight.original.mul_(2)
        assert torch.equal(model(x), before)  # the user's own cache is still there
    assert torch.equal(got, expected)
