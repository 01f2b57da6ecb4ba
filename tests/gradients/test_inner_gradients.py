"""A gradient that a model or its loss takes before the forward pass has ended is seen as it happens.

So the factored route has it right without the check of the run and without the trial of its plan, also where one
sequence alone takes it.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loops import class_losses, rows_of, samples
from oracle import gram_errors
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional

import fisherfunc as ff
from fisherfunc.gradients.factored.route import factored_grams
from fisherfunc.gradients.start import started

ROW = 3
"""The only one that `on_one_sequence` differentiates."""


class Differentiating(nn.Module):
    """A way to take a gradient between two linear maps."""

    def __init__(self, way: Callable) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        self.first, self.head, self.way = nn.Linear(5, 5), nn.Linear(5, 3), way

    def forward(self, x):
        return self.way(self, x)


def by_the_input(model, x):
    with torch.enable_grad():
        inside = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(model.energy(inside).sum(), inside, create_graph=True)
    return model.head(model.first(x) + force)


def on_one_sequence(model, x):
    return by_the_input(model, x) if bool((x[:, 0] > 5).any()) else model.head(model.first(x) + model.energy(x))


def by_a_hidden_value(model, x):
    hidden = model.first(x).tanh()
    (force,) = torch.autograd.grad(model.energy(hidden).sum(), hidden, create_graph=True)
    return model.head(hidden + force)


def by_what_came_before(model, x):
    hidden = model.first(x).tanh()
    output = model.head(hidden * 1.5)
    (force,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    return model.head(hidden + force)


def none_by_what_came_before(model, x):
    hidden = model.first(x).tanh()
    (force,) = torch.autograd.grad(model.head(2 * hidden).square().sum(), hidden, create_graph=True, allow_unused=True)
    return model.head(hidden if force is None else hidden + force)


def by_a_weight(model, x):
    weight = model.energy[0].weight
    (slope,) = torch.autograd.grad(model.energy(x).square().sum(), weight, create_graph=True)
    hidden = functional.linear(x, weight - 0.1 * slope, model.energy[0].bias).tanh()
    return model.head(model.first(x) + model.energy[2](hidden))


def none_by_a_bias(model, x):
    output = model.head(model.first(x))
    found = torch.autograd.grad(output.square().sum(), model.head.bias, create_graph=True, allow_unused=True)[0]
    return output if found is None else output + found


def by_a_backward_pass(model, x):
    hidden = model.first(x)
    hidden.retain_grad()
    model.energy(hidden).sum().backward(create_graph=True)
    return model.head(hidden + hidden.grad)


def that_a_bias_has(model, x):
    output = model.head(model.first(x))
    output.square().sum().backward(create_graph=True, inputs=[model.head.bias])
    found = model.head.bias.grad
    return output if found is None else output + found


def of_no_graph(model, x):
    with torch.enable_grad():
        inside = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(model.energy(inside).sum(), inside)
    return model.head(model.first(x) + force) + model.energy(x)


def forwards(model, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return model.head(model.first(x) + forward_ad.unpack_dual(model.energy(dual)).tangent)


WAYS = (
    *(by_the_input, on_one_sequence, by_a_hidden_value, by_what_came_before, none_by_what_came_before, by_a_weight),
    *(none_by_a_bias, by_a_backward_pass, that_a_bias_has, of_no_graph, forwards),
)


def drawn(way):
    model, (x, y) = Differentiating(way).double(), samples()
    x[ROW, 0] = 10.0
    losses = class_losses(lambda b: fresh(model)(x[b : b + 1]), x, y)
    return model, (x, y), rows_of(model, losses)


def fresh(model):
    """The model with no gradients left from before."""
    model.zero_grad()
    return model


def factored_without_checks(model, batch, loss):
    fn = ff.functionalize(model)
    start = started(fn, fn.at(fn.params), batch, loss, self_check=False)
    return factored_grams(start.work, replace(start.options, tried=False))[0]


def assert_right(grams, rows):
    assert max(gram_errors(grams, rows, floor=1e-15).values()) < 1e-10


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_factors_are_right_where_nothing_holds_them_against_anything(way):
    model, batch, rows = drawn(way)
    loss = ff.losses.each_alone(ff.losses.classification())  # one sequence may be another model than its neighbours
    assert_right(factored_without_checks(model, batch, loss), rows)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_the_check_agrees_and_only_what_it_needs_to_is_given_up(way):
    model, batch, rows = drawn(way)
    fn = ff.functionalize(model)
    found = ff.token_grams(fn, fn.params, batch, ff.losses.each_alone(ff.losses.classification()))
    assert_right(found.grams, rows)
    assert found.metadata["route"] == "factored" and found.metadata["self_check"]["held"]
    factors_differ = "its factors do not give its gradient"
    assert factors_differ not in found.metadata["formed_parameters"].values()


def test_a_gradient_that_the_loss_takes_is_seen_as_well():
    class Values(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                return x, self.net(x)

    def penalty(output, batch):
        x, value = output
        if not torch.is_grad_enabled():  # a look at values
            return torch.zeros_like(value[:, 0])
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return slope.square().sum(-1)

    model, (x, y) = Values().double(), samples()
    rows = rows_of(model, [lambda b=b: penalty(model(x[b : b + 1]), None).sum() for b in range(len(x))])
    assert_right(factored_without_checks(model, (x, y), ff.losses.custom(penalty)), rows)
