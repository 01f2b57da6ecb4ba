"""Every call starts from the module as the user gave it, and nothing of the user's is written to.

The oracle runs a fresh deep copy of the module for every token, in float64.
"""

import enum
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fresh_copies import drawn, errors_of, fresh_rows
from odd_modules import Body, samples
from oracle import gram_errors
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from watching import changes, snapshot

import fisherfunc as ff
from fisherfunc.gradients.survey.prepare import ROUTES
from fisherfunc.models.calls.isolation import Blueprint


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


STATE = {
    "cached in a dictionary": lambda: CachedBias(dict),
    "cached in an object": lambda: CachedBias(Anything),
    "state": KeepsState,
    "table": GrowingTable,
    "hooks itself": HooksItself,
    "listed": ListedModules,
    "runs again": BackwardRunsModule,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", STATE.values(), ids=STATE)
def test_every_call_starts_from_the_module_as_it_was_given(make, route):
    model, batch = drawn(make), samples()
    rows = fresh_rows(model, batch)
    before = snapshot(model)
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
        cache.seen.append(float(len(cache.seen)))
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


class LeavesOut(Body):
    """A copy by its own `__getstate__` lacks a cache that the forward pass reads."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = {"factor": 2.0}

    def __getstate__(self):
        return {**vars(self), "cache": {}}

    def __setstate__(self, state):
        vars(self).update(state)

    def between(self, x):
        return x * self.cache.get("factor", 1.0)


def test_a_module_whose_copies_lack_something_is_named():
    with pytest.raises(TypeError, match=r"the deep copy of 'the module' \(LeavesOut\) has another 'cache'"):
        ff.functionalize(drawn(LeavesOut))


class RunningMean(nn.Module):
    """A loss that keeps a statistic of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, output, batch):
        self.seen += 1
        return functional.cross_entropy(output, batch[-1], reduction="none") * self.seen


def test_a_loss_that_keeps_something_starts_as_it_was_given():
    model, batch, loss = drawn(Body), samples(), RunningMean()
    fn = ff.functionalize(model)
    got = ff.token_grams(fn, fn.params, batch, ff.losses.custom(loss))
    assert float(loss.seen) == 0
    errors = gram_errors(got.grams, fresh_rows(model, batch), floor=1e-15)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("error", [OSError("no such file"), StopIteration("no more")])
def test_whatever_a_forward_pass_raises_is_told_in_our_words(error):
    class Raises(Body):
        def between(self, x):
            raise error

    with pytest.raises(ValueError, match=f"the model failed on sequence 0, .*{type(error).__name__}"):
        ff.fisher_spectrum(drawn(Raises), samples())
