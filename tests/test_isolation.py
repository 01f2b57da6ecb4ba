"""Every call starts from the module as the user gave it, and nothing of the user's is written to.

The oracle runs a fresh deep copy of the module for every token, in float64.
"""

import copy
import enum
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from odd_modules import Body, samples
from oracle import gram_errors
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from watching import changes, snapshot

import fisherfunc as ff
from fisherfunc.gradients.prepare import ROUTES
from fisherfunc.models.isolation import Blueprint


def fresh_rows(model: nn.Module, batch: tuple, extra: tuple = ()) -> dict[str, torch.Tensor]:
    """The gradients of samples, each of a copy of the module of its own, whose flags say evaluation."""
    rows: dict[str, list[torch.Tensor]] = {}
    for b in range(len(batch[0])):
        private = copy.deepcopy(model)
        for part in private.modules():
            part.training = False
        inputs = [x[b : b + 1].clone() for x in batch[:-1]]
        functional.cross_entropy(private(*inputs, *copy.deepcopy(extra)), batch[-1][b : b + 1]).backward()
        for name, p in private.named_parameters():
            if p.requires_grad:
                rows.setdefault(name, []).append((torch.zeros_like(p) if p.grad is None else p.grad).flatten())
    return {name: torch.stack(r) for name, r in rows.items()}


class CachedBias(Body):
    """A value made of a parameter, kept in evaluation mode by whatever it is that keeps it."""

    def __init__(self, keep: Callable[[], object]) -> None:
        super().__init__()
        self.bias, self.kept = nn.Parameter(torch.randn(5)), keep()

    def between(self, x):
        store = self.kept if isinstance(self.kept, dict) else vars(self.kept)
        if "bias" not in store:
            store["bias"] = self.bias.cumsum(0)
        return x + store["bias"]


class Anything:
    pass


class KeepsState(Body):
    """Each call goes on from what the one before left."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.calls, self.seen = torch.zeros(1, 5), 0, [1.0]

    def between(self, x):
        self.calls += 1
        self.state += x.detach().mean(0)
        self.seen.append(float(x.detach().sum()))
        return x * self.calls * sum(self.seen) + self.state


class GrowingTable(Body):
    """A buffer and the attribute that says how far it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def between(self, x):
        if self.length < 5:
            self.length = 5
            self.register_buffer("table", torch.arange(5.0, dtype=torch.float64), persistent=False)
        return x * self.table


class HooksItself(Body):
    """A hook that is added at each call counts double the next time."""

    def between(self, x):
        self.head.register_forward_hook(lambda module, inputs, output: output * 2)
        return x


class ListedModules(Body):
    """The layer is reached through a list beside the registry, and a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.call = [self.layer], self.layer.forward

    def between(self, x):
        return self.listed[0](x) + self.call(x)


class RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, x, *params):
        ctx.module = module
        ctx.save_for_backward(x, *params)
        return module(x)

    @staticmethod
    def backward(ctx, cotangent):
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.module(x), (x, *params), cotangent, allow_unused=True)


class BackwardRunsModule(Body):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh())

    def between(self, x):
        return RunAgain.apply(self.inner, x, *self.inner.parameters())


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
STATE = {
    "cached in a dictionary": lambda: CachedBias(dict),
    "cached in an object": lambda: CachedBias(Anything),
    "state": KeepsState,
    "table": GrowingTable,
    "hooks itself": HooksItself,
    "listed": ListedModules,
    "runs again": BackwardRunsModule,
}


def drawn(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double()
    if hasattr(model, "state"):
        model.state = model.state.double()
    return model


def errors_of(model: nn.Module, batch: tuple, rows: dict[str, torch.Tensor], route: str) -> dict[str, float]:
    fn = ff.functionalize(model)
    got = ff.token_grams(fn, fn.params, batch, ff.losses.classification(), route=route, blocks=lambda name: name)
    return gram_errors(got.grams, rows, floor=1e-15)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", STATE.values(), ids=STATE)
def test_every_call_starts_from_the_module_as_it_was_given(make, route):
    model, batch = drawn(make), samples()
    rows = fresh_rows(model, batch)
    before = snapshot(model)
    errors = errors_of(model, batch, rows, route)
    assert max(errors.values()) < 1e-10, errors
    assert changes(before, snapshot(model)) == []


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


class WritesTwo(Writes):
    """Where the second write is seen, the first is done already."""

    def __init__(self) -> None:
        super().__init__(WRITES["through NumPy"])
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


def test_a_weight_that_only_the_check_would_write_to_stays_the_users():
    """A sequence alone runs twice over there."""
    model = drawn(lambda: Writes(lambda weight, x: weight.mul_(0.5) if len(x) == 2 else None))
    batch = tuple(entry[:1] for entry in samples())
    before = snapshot(model)
    with pytest.raises(ValueError, match="differs from an ordinary backward pass of sequence 0"):
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


class Vocabulary:
    """What a tokenizer holds, and counts."""

    def __init__(self) -> None:
        self.ids = {f"token {number}": number for number in range(1000)}
        self.merges = [(f"to {number}", "ken") for number in range(1000)]
        self.again = self.ids


class HoldsVocabulary(Body):
    """It learns a word at each call, and reads how many it knows by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary, self.special = Vocabulary(), set(range(100))

    def between(self, x):
        self.vocabulary.ids[f"token {len(self.vocabulary.ids)}"] = 0
        self.vocabulary.merges.append(("a", "b"))
        self.special.add(len(self.special))
        return x * (len(self.vocabulary.again) + len(self.vocabulary.merges) + len(self.special)) / 2000


@pytest.mark.parametrize("route", ROUTES)
def test_a_vocabulary_that_a_module_holds_is_its_own_in_each_call(route):
    model, batch = drawn(HoldsVocabulary), samples()
    rows = fresh_rows(model, batch)
    errors = errors_of(model, batch, rows, route)
    assert max(errors.values()) < 1e-10, errors
    assert len(model.vocabulary.ids) == len(model.vocabulary.merges) == 1000 and len(model.special) == 100


class Kind(enum.Enum):
    WORD = 1

    def __deepcopy__(self, memo):
        raise AssertionError("an entry is looked at again")


def test_a_vocabulary_is_not_looked_through_at_each_call():
    model = Body()
    model.kinds = Anything()
    model.kinds.by_token = {f"token {number}": Kind.WORD for number in range(1000)}
    made = Blueprint(model).build({})
    assert made.kinds.by_token == model.kinds.by_token and made.kinds.by_token is not model.kinds.by_token


class CachedOutside(CachedBias):
    """A value made of a parameter, kept where no copy of the module reaches it: by its class."""

    def __init__(self) -> None:
        super().__init__(dict)
        del self.kept
        type(self).kept = {}


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_kept_of_a_weight_outside_of_the_module_is_refused(route):
    model = drawn(CachedOutside)
    with pytest.raises(ValueError, match=r"reaches a parameter of shape .*'bias'.* a cache of its class"):
        ff.fisher_spectrum(model, samples(), route=route)


class Draws(Body):
    """A number of Python's, and one of NumPy's, in each call; a layer is drawn when it goes into evaluation mode."""

    def between(self, x):
        return x * (1 + random.random() + np.random.random())

    def train(self, mode=True):
        nn.Linear(2, 2)
        return super().train(mode)


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_model_draws_is_the_same_in_each_call_and_moves_no_generator(route):
    model, batch = drawn(Draws), samples()
    before = np.random.get_state(), torch.get_rng_state()
    first, second = (ff.fisher_spectrum(model, batch, route=route).full.eigenvalues for _ in range(2))
    assert torch.equal(first, second)  # of Python's generator as well, which the type checker of the tests moves
    assert all(np.array_equal(was, now) for was, now in zip(before[0], np.random.get_state(), strict=True))
    assert torch.equal(before[1], torch.get_rng_state())


class Shared(nn.Linear):
    """Its deep copy is itself."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("make", [lambda: Shared(5, 3), lambda: nn.Sequential(nn.Linear(5, 5), Shared(5, 3))])
def test_a_part_that_is_its_own_deep_copy_is_named_and_stays_in_its_mode(make):
    model, batch = drawn(make).train(), samples()
    before = snapshot(model)
    with pytest.raises(TypeError, match="a __deepcopy__ that shares it"):
        ff.fisher_spectrum(model, batch)
    assert changes(before, snapshot(model)) == []


class NeverEvaluates(nn.Linear):
    def train(self, mode=True):
        if not mode:
            raise RuntimeError("only ever trains")
        return super().train(mode)


def test_a_model_that_cannot_be_evaluated_is_said_to_be_so():
    with pytest.raises(ValueError, match=r"cannot be put into evaluation mode: .* RuntimeError: only ever trains"):
        ff.functionalize(NeverEvaluates(5, 3))


class ReadsCache(Body):
    """What is no tensor in the batch is written to: an object, a list and a dictionary in it."""

    def forward(self, x, cache):
        cache.seen.append(float(x.detach().sum()))
        cache.sums["all"] = cache.sums.get("all", 1.0) + 1.0
        return super().forward(x) * sum(cache.seen) * cache.sums["all"]


@pytest.mark.parametrize("route", ROUTES)
def test_an_object_in_the_batch_is_not_written_to(route):
    cache = Anything()
    cache.seen, cache.sums = [1.0], {}
    model, (x, y) = drawn(ReadsCache), samples()
    rows = fresh_rows(model, (x, y), extra=(cache,))
    errors = errors_of(model, (x, cache, y), rows, route)
    assert max(errors.values()) < 1e-10, errors
    assert cache.seen == [1.0] and cache.sums == {}


@pytest.mark.parametrize("route", ROUTES)
def test_a_loss_that_writes_to_the_batch_writes_to_a_copy(route):
    def loss(output, batch):
        batch[1].add_(1).remainder_(3)
        return functional.cross_entropy(output, batch[1], reduction="none")

    model, (x, y) = drawn(Body), samples()
    given = y.clone()
    rows = fresh_rows(model, (x, (y + 1) % 3))
    fn = ff.functionalize(model)
    got = ff.token_grams(fn, fn.params, (x, given), ff.losses.custom(loss), route=route, blocks=lambda name: name)
    assert torch.equal(given, y)
    assert max(gram_errors(got.grams, rows, floor=1e-15).values()) < 1e-10


def test_what_cannot_be_copied_in_a_batch_is_named(tmp_path):
    model, (x, y) = drawn(ReadsCache), samples()
    fn = ff.functionalize(model)
    with open(tmp_path / "open", "w") as file, pytest.raises(TypeError, match="a TextIOWrapper that cannot be copied"):
        fn.apply(fn.params, (x, file, y))


def test_parametrisations_and_compiled_parts_are_isolated_as_well():
    def make():
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), torch.compile(nn.Linear(6, 3), backend="eager"))
        parametrize.register_parametrization(model[0], "weight", nn.Tanh())
        return model

    model, batch = drawn(make), samples()
    rows = fresh_rows(model, batch)
    before = snapshot(model)
    errors = errors_of(model, batch, rows, "factored")
    assert max(errors.values()) < 1e-10, errors
    assert changes(before, snapshot(model)) == []
