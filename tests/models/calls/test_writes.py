"""What a module writes to in its forward pass, or as it goes into evaluation mode, stays the user's."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from fresh_copies import drawn, errors_of, fresh_rows
from odd_modules import Body, samples
from oracle import gram_errors
from torch import nn
from torch.nn import functional
from watching import changes, snapshot

import fisherfunc as ff
from fisherfunc.gradients.survey.prepare import ROUTES


class Writes(Body):
    """A forward pass that writes to a weight: all of them, or frozen, or where the input says so."""

    def __init__(self, write: Callable[[nn.Parameter, torch.Tensor], None], *, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(2 * torch.randn(5, 5), requires_grad=not frozen)
        self.write = write

    def between(self, x):
        with torch.no_grad():
            self.write(self.weight, x)
        return x @ self.weight


def where_asked(weight, x):
    if x.sum() > 0:
        weight.mul_(0.5)


def in_gradient_mode(weight, x):
    with torch.enable_grad():
        recorded = (weight * x[0]).requires_grad
    if recorded and x.requires_grad:
        weight.mul_(0.5)


WRITES = {
    "in place": lambda weight, x: weight.div_(weight.norm(dim=1, keepdim=True)),
    "data": lambda weight, x: weight.data.clamp_(-0.5, 0.5),
    "entries": lambda weight, x: weight.__setitem__(0, 0.0),
    "a view": lambda weight, x: weight.T[1:3].zero_(),
    "several": lambda weight, x: torch._foreach_mul_([weight], 0.5),
    "out": lambda weight, x: torch.sin(weight, out=weight),
    "an array": lambda weight, x: weight.numpy().__imul__(0.5),
    "an array of another library": lambda weight, x: np.asarray(weight.detach()).fill(0.25),
    "where asked": where_asked,
    "in gradient mode": in_gradient_mode,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_weight_that_the_forward_pass_writes_to_stays_the_users(write, frozen, route):
    model, batch = drawn(lambda: Writes(write, frozen=frozen)), samples()
    rows = fresh_rows(model, batch)
    before = snapshot(model)
    errors = errors_of(model, batch, rows, route)
    assert changes(before, snapshot(model)) == []
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("name", sorted(WRITES.keys() - {"where asked"}))  # in which samples depend on each other
def test_a_graph_of_the_users_can_still_be_gone_back_through(name):
    """Version counters are the user's too: a copy of a weight that is written to has one of its own."""
    model, batch = drawn(lambda: Writes(WRITES[name])), samples()
    loss = model.weight.square().sum()
    ff.fisher_spectrum(model, batch)
    loss.backward()
    torch.testing.assert_close(model.weight.grad, 2 * model.weight.detach(), rtol=0, atol=0)


class WritesTwo(Writes):
    """Where the second write is seen, the first is done already."""

    def __init__(self) -> None:
        super().__init__(WRITES["an array"])
        self.other = Writes(WRITES["in place"])

    def between(self, x):
        return self.other.between(super().between(x))


@pytest.mark.parametrize("route", ROUTES)
def test_a_call_that_starts_again_starts_from_the_weights_as_they_were(route):
    model, batch = drawn(WritesTwo), samples()
    rows = fresh_rows(model, batch)
    before = snapshot(model)
    errors = errors_of(model, batch, rows, route)
    assert max(errors.values()) < 1e-10, errors
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("route", ROUTES)
def test_a_weight_that_only_a_later_sequence_of_the_shape_writes_to_stays_the_users(route):
    def write(weight, x):
        if float(x.sum()) == last:
            weight.mul_(0.5)

    model, batch = drawn(lambda: Writes(write)), samples()
    last = torch.tanh(model.layer(batch[0]))[-1:].sum().item()
    rows = fresh_rows(model, batch)
    before = snapshot(model)
    fn, loss = ff.functionalize(model), ff.losses.each_alone(ff.losses.classification())
    got = ff.token_grams(fn, fn.params, batch, loss, route=route)
    assert max(gram_errors(got.grams, rows, floor=1e-15).values()) < 1e-10
    assert changes(before, snapshot(model)) == []


class WritesAtSomeSizes(nn.Module):
    """A causal model that writes to a weight where gradients are on and a size is not what each sequence has."""

    def __init__(self, write: Callable[[nn.Parameter], object], axis: int, size: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.write, self.axis, self.size = write, axis, size

    def forward(self, input_ids):
        if input_ids.shape[self.axis] != self.size and torch.is_grad_enabled():
            with torch.no_grad():
                self.write(self.weight)
        return self.head(torch.tanh(self.embedding(input_ids).cumsum(1) @ self.weight))


RECORDED_WRITES = {
    "in place": lambda weight: weight.mul_(0.5),
    "augmented": lambda weight: weight.__imul__(0.5),
    "entries": lambda weight: weight.__setitem__(0, 0.0),
    "a view": lambda weight: weight.data.T[1:3].zero_(),
    "several": lambda weight: torch._foreach_mul_([weight], 0.5),
    "out": lambda weight: torch.sin(weight, out=weight),
    "initialised": lambda weight: nn.init.zeros_(weight),
    "an array": lambda weight: weight.numpy().fill(0.25),
}


@pytest.mark.parametrize(("axis", "size"), [(0, 1), (1, 9)], ids=["in a stack", "in a prefix"])
@pytest.mark.parametrize("write", RECORDED_WRITES.values(), ids=RECORDED_WRITES)
def test_a_weight_that_only_a_recorded_pass_of_another_size_writes_to_stays_the_users(write, axis, size):
    model = drawn(lambda: WritesAtSomeSizes(write, axis, size))
    model.eval()
    batch = {"input_ids": torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(0))}
    alone = drawn(lambda: WritesAtSomeSizes(lambda weight: None, axis, size))
    before = snapshot(model)
    fn = ff.functionalize(model)
    loss = ff.losses.each_alone(ff.losses.causal_lm())  # else the check says that they meet
    got = ff.token_grams(fn, fn.params, batch, loss)
    assert changes(before, snapshot(model)) == []
    right = ff.functionalize(alone)
    rows = ff.per_token_gradients(right, right.params, batch, loss)
    assert max(gram_errors(got.grams, {n: g.flatten(1) for n, g in rows.items()}, floor=1e-15).values()) < 1e-10


def test_a_weight_that_only_the_check_would_write_to_stays_the_users():
    """A sequence alone runs twice over there."""
    model = drawn(lambda: Writes(lambda weight, x: weight.mul_(0.5) if len(x) == 2 else None))
    batch = tuple(entry[:1] for entry in samples())
    before = snapshot(model)
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        ff.fisher_spectrum(model, batch)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("route", ROUTES)
def test_grams_are_in_no_graph_where_a_parameter_is_empty(route):
    class HasEmpty(Body):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.zeros(0, 2))

        def between(self, x):
            return functional.dropout(x, 0.5, training=True) * (1 + self.empty.sum())

    fn, batch = ff.functionalize(drawn(HasEmpty)), samples()
    for unit in ("token", "sequence"):
        got = ff.token_grams(fn, fn.params, batch, ff.losses.classification(), route=route, unit=unit)
        assert not any(gram.requires_grad for gram in got.grams.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_that_the_forward_pass_gives_other_memory_is_named(frozen):
    model = drawn(lambda: Writes(lambda weight, x: setattr(weight, "data", weight.data / 2), frozen=frozen))
    batch, before = samples(), snapshot(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="gives 'weight' other memory"):
            ff.fisher_spectrum(model, batch)
        assert changes(before, snapshot(model)) == []


class Folding(nn.Linear):
    """`train(False)` folds a low-rank update into a frozen weight, by one of the ways to do so."""

    def __init__(self, fold: Callable[[nn.Module, torch.Tensor], None]) -> None:
        super().__init__(5, 5)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(5, 2))
        self.fold, self.folded = fold, False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.folded:
            self.fold(self, (-1 if mode else 1) * (self.b @ self.a).detach())
            self.folded = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.folded else y + x @ self.a.T @ self.b.T


FOLDS = {
    "data in place": lambda layer, update: layer.weight.data.add_(update),
    "array": lambda layer, update: layer.weight.numpy().__iadd__(update.numpy()),
    "data replaced": lambda layer, update: setattr(layer.weight, "data", layer.weight.data + update),
    "parameter replaced": lambda layer, update: setattr(layer, "weight", nn.Parameter(layer.weight + update, False)),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_a_module_that_folds_weights_in_evaluation_mode_is_not_folded(fold, route):
    torch.manual_seed(0)
    model = nn.Sequential(Folding(fold), nn.Tanh(), nn.Linear(5, 3)).double().train()
    batch = samples()
    rows = fresh_rows(model, batch)
    before = snapshot(model)
    for _ in range(2):
        errors = errors_of(model, batch, rows, route)
        assert max(errors.values()) < 1e-10, errors
        assert changes(before, snapshot(model)) == []


class KeepsScaled(nn.Linear):
    """`train(False)` keeps what it makes of a weight, and the forward pass then reads that."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.kept = None

    def train(self, mode=True):
        self.kept = None if mode else self.weight.detach() * 2
        return super().train(mode)

    def forward(self, x):
        return functional.linear(x, self.weight * 2 if self.kept is None else self.kept, self.bias)


@pytest.mark.parametrize("route", ROUTES)
def test_what_evaluation_mode_would_keep_of_a_weight_does_not_hide_its_gradient(route):
    torch.manual_seed(0)
    model = nn.Sequential(KeepsScaled(), nn.Tanh(), nn.Linear(5, 3)).double().train()
    batch = samples()
    rows, before = fresh_rows(model, batch), snapshot(model)
    errors = errors_of(model, batch, rows, route)
    assert max(errors.values()) < 1e-10, errors
    assert changes(before, snapshot(model)) == []
