"""What a module shares with others, or with what lies outside of it: each call has its own, or it is refused.

The oracle runs a fresh deep copy of the module for every token, in float64.
"""

import copy
from collections import OrderedDict

import pytest
import torch
from fresh_copies import errors_of, fresh_rows
from odd_modules import Body, samples
from oracle import gram_errors
from torch import nn
from torch.nn import functional
from watching import changes, snapshot

import fisherfunc as ff
from fisherfunc.gradients.survey.prepare import ROUTES


class Anything:
    pass


class Counted(Body):
    """Each call multiplies by another number, counted outside of the module."""

    calls = 0

    def __init__(self, where: str) -> None:
        super().__init__()
        numbers = []

        def in_a_function(x):
            in_a_function.calls = getattr(in_a_function, "calls", 0) + 1
            return x * in_a_function.calls

        def in_a_closure(x):
            numbers.append(1)
            return x * len(numbers)

        def in_the_class(x):
            Counted.calls += 1
            return x * Counted.calls

        def in_a_default(x, seen=[]):  # noqa: B006 (as people have it)
            seen.append(1)
            return x * len(seen)

        self.count = {f.__name__: f for f in (in_a_function, in_a_closure, in_the_class, in_a_default)}[where]

    def between(self, x):
        return self.count(x)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("where", ["in_a_function", "in_a_closure", "in_the_class", "in_a_default"])
def test_what_a_model_goes_on_from_outside_of_the_module_is_refused(where, route):
    fn = ff.functionalize(Counted(where).double())
    with pytest.raises(ValueError, match="sequence 0 has other losses when it runs again"):
        alone = ff.losses.each_alone(ff.losses.classification())
        ff.token_grams(fn, fn.params, samples(), alone, route=route, self_check=False)


class Tally(nn.Module):
    """Writes to what it holds beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.kept = {"sum": torch.zeros(1)}

    def forward(self, x, what="calls"):
        (self.calls if what == "calls" else self.kept["sum"]).add_(1)
        return x


@pytest.mark.parametrize("what", ["calls", "sum"])
def test_a_method_of_the_users_module_itself_writes_to_nothing_of_it(what):
    class Patched(Body):
        def __init__(self):
            super().__init__()
            self.tally = Tally()
            itself = self.tally.forward
            self.tally.forward = lambda x: itself(x, what)

        def between(self, x):
            return self.tally(x)

    model = Patched().double()
    before = (model.tally.calls.clone(), model.tally.kept["sum"].clone())
    with pytest.raises(ValueError, match="of the module that was given, and not to that of the copy"):
        ff.fisher_spectrum(model, samples())
    assert (model.tally.calls, model.tally.kept["sum"]) == before


def test_a_method_of_a_list_is_named_as_it_would_change_the_users_list():
    model = Body()
    model.seen = []
    model.put = model.seen.append
    with pytest.raises(TypeError, match="'put' of 'the module' is a method of one list"):
        ff.functionalize(model)


def test_losses_are_those_of_a_model_that_is_differentiated():
    class Doubled(Body):
        def between(self, x):
            return x * 2 if torch.is_grad_enabled() else x

    model, (x, y) = Doubled().double(), samples()
    found = ff.fisher_spectrum(model, (x, y), blocks=ff.whole)
    assert abs(found.metadata["mean_loss"] - float(functional.cross_entropy(model(x), y).detach())) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
def test_a_generator_that_a_module_holds_draws_the_same_in_each_call(route):
    class Noisy(Body):
        def __init__(self):
            super().__init__()
            self.kept = Anything()
            self.kept.generators = [torch.Generator().manual_seed(3)]

        def between(self, x):
            return x + torch.randn(x.shape[1], generator=self.kept.generators[0], dtype=x.dtype)

    model, batch = Noisy().double(), samples()
    before = model.kept.generators[0].get_state()
    errors = errors_of(model, batch, fresh_rows(model, batch), route)
    assert max(errors.values()) < 1e-10
    assert torch.equal(model.kept.generators[0].get_state(), before)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", [dict, list])
def test_an_empty_container_that_two_modules_hold_is_one_in_each_call(kind, route):
    class Writer(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared, self.layer = shared, nn.Linear(5, 5)

        def forward(self, x):
            self.shared.update(seen=x) if isinstance(self.shared, dict) else self.shared.append(x)
            return self.layer(x)

    class Sharing(Body):
        def __init__(self):
            super().__init__()
            self.shared = kind()
            self.writer = Writer(self.shared)

        def between(self, x):
            x = self.writer(x)
            return x + sum(self.shared.values() if isinstance(self.shared, dict) else self.shared)

    model, batch = Sharing().double(), samples()
    fn = ff.functionalize(model)
    found = ff.token_grams(fn, fn.params, batch, ff.losses.classification(), route=route, self_check=False)
    assert max(gram_errors(found.grams, fresh_rows(model, batch), floor=1e-15).values()) < 1e-10


@pytest.mark.parametrize("make", [torch.zeros, torch.Generator, lambda n=3: torch.zeros(n, requires_grad=True) * 2])
def test_tensors_in_an_object_of_the_users_leave_the_factors_as_they_are(make):
    class Holding(Body):
        def __init__(self):
            super().__init__()
            self.kept = Anything()
            self.kept.inside = {"tensor": make(3) if make is not torch.Generator else make()}

    model = Holding().double()
    fn = ff.functionalize(model)
    found = ff.token_grams(fn, fn.params, samples(), ff.losses.classification())
    assert found.metadata["route"] == "factored" and not found.metadata["formed_parameters"]


WRITES = {
    "a dictionary": lambda model, h: model.kept.update(last=h),
    "an ordered one": lambda model, h: model.ordered.update(first=0, other=h),
    "a list": lambda model, h: model.seen.append(h),
    "a set": lambda model, h: model.found.add(h.shape),
    "an attribute": lambda model, h: setattr(model, "last", h),
    "an object": lambda model, h: setattr(model.inner, "last", h),
    "a layer": lambda model, h: setattr(model.layer, "last", h),
    "a registry": lambda model, h: model.register_buffer("last", h.detach()),
    "several": lambda model, h: (model.kept.clear(), model.seen.pop(), delattr(model, "number")),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_hook_that_keeps_activations_in_the_users_module_leaves_nothing_there(write, route):
    """It has the module in its closure, as hooks have that a loop adds; the number of calls counts from the module."""
    model = Body().double()
    model.kept, model.seen, model.found = {"first": 1}, ["first"], {"first"}
    model.ordered = OrderedDict(other=1, first=2)
    model.inner, model.number = Anything(), 2.0

    def hook(module, args, output):
        scale = model.number + len(model.seen)
        write(model, output)
        return output * scale

    model.layer.register_forward_hook(hook)
    batch = samples()
    before = snapshot(model), {**vars(model)}, {**vars(model.inner)}, [*model.ordered]
    rows = fresh_rows_of_closures(model, batch)
    assert max(errors_of(model, batch, rows, route).values()) < 1e-10
    assert changes(before[0], snapshot(model)) == []
    assert before[1:] == ({**vars(model)}, {**vars(model.inner)}, [*model.ordered])
    copy.deepcopy(model)  # nothing of a graph is left in it


def fresh_rows_of_closures(model, batch):
    """The gradients of samples of the module itself, as the hook is meant to find it, without what it writes."""
    scale = model.number + len(model.seen)
    plain = copy.deepcopy(model)
    plain.layer._forward_hooks.clear()
    plain.layer.register_forward_hook(lambda module, args, output: output * scale)
    return fresh_rows(plain, batch)
