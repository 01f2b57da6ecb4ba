"""What an ordinary call shows that no pass sees: samples in other company, and what is left of calls before."""

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fisherfunc as ff
from fisherfunc.gradients.checks import ordinary
from fisherfunc.gradients.factored import divide
from fisherfunc.gradients.rows.stacks import neighbours
from fisherfunc.gradients.survey.prepare import ROUTES, prepared


class ScaledByCount(torch.autograd.Function):
    """The identity, whose gradient grows with the number of samples."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count = len(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.count


class Grows(nn.Module):
    """Samples of any number of positions, whose mean is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(ScaledByCount.apply(torch.tanh(self.first(x)).mean(1)))


def samples(count: int, positions: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(count, positions, 5, dtype=torch.float64), torch.arange(count) % 3


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("counts", [[1], [2], [3], [4], [5], [8], [3, 3], [2, 3], [6, 3], [1, 4, 2]])
def test_gradients_that_grow_with_the_number_of_samples_are_seen_at_every_number(counts, route):
    """Also where groups of other shapes are larger or smaller than the group that is wrong."""
    batches = [samples(count, positions) for positions, count in enumerate(counts, start=1)]
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        ff.fisher_spectrum(Grows(), batches, route=route)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(6))
def test_they_are_seen_in_samples_that_are_alike(seed, route):
    """Whose weighted gradients would cancel where weights differ in sign alone."""
    x, y = samples(1)
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        ff.fisher_spectrum(Grows(), (x.expand(2, -1, -1).clone(), y.expand(2).clone()), route=route, seed=seed)


@pytest.mark.parametrize(("count", "ran"), [(9, 6), (7, 4), (5, 2), (8, 3)])
def test_they_are_seen_in_a_last_stack_that_is_narrower(count, ran, monkeypatch):
    monkeypatch.setattr(divide, "stack_width", lambda *_: ran)
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        ff.fisher_spectrum(Grows(), samples(count), route="factored")


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), ran=st.integers(1, 9), limit=st.sampled_from([1, 10**9])
)
def test_no_sequence_has_the_company_in_the_check_that_it_had_in_the_pass(counts, ran, limit):
    fn, batches = ff.functionalize(Grows()), [samples(count, n) for n, count in enumerate(counts, start=1)]
    loss = ff.losses.classification()
    work = prepared(fn, fn.params, batches, loss).work
    before = [set(group) for group in neighbours(range(sum(counts)), work.sequences, ran)]
    here = list(ordinary.companies(work, ran=ran, limit=limit))
    assert [member for company in here for member in company.members] == list(range(sum(counts)))
    for company in here:
        assert work.tokens.sequence[company.first : company.last].tolist() == list(company.members)
        group = next(group for group in before if company.members[0] in group)
        together = len(company.members) + company.beside * (len(company.members) == 1)
        assert ran == 1 or (set(company.members) <= group and together != len(group))


class MeetsInGradients(nn.Module):
    """The mean over the batch has value zero, and a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        mean = y.mean(0, keepdim=True)
        return y + (mean - mean.detach())


@pytest.mark.parametrize("route", ROUTES)
def test_one_sample_is_checked_beside_others_than_the_next_which_may_be_like_it(route):
    torch.manual_seed(0)
    x, labels = torch.randn(5, 1, 3).double(), torch.full((5, 1), -100)
    x[2], labels[1] = x[1], 3
    with pytest.raises(ValueError, match="samples of a batch depend on each other"):
        ff.fisher_spectrum(MeetsInGradients(), (x, labels), loss=ff.losses.classification(), route=route)


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_of_tensors_that_are_no_parameters_stay_as_they_were(route):
    """Of a scale in a closure, say, that the backward pass of the check reaches as well."""
    scale, kept = (torch.full((4,), 1.5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kept.grad = before = torch.ones_like(kept)

    class Scaled(Grows):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)).mean(1) * scale * kept)

    ff.fisher_spectrum(Scaled(), samples(3), route=route)
    assert scale.grad is None and kept.grad is before and torch.equal(before, torch.ones_like(before))


class _Failing(torch.autograd.Function):
    """A function without a backward pass."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error("only in training mode")


class FailsBackward(nn.Module):
    """A model that has gradients in training mode alone, as reversible layers may."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.first, self.last, self.error = nn.Linear(5, 4), nn.Linear(4, 3), error

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h if self.training else _Failing.apply(h, self.error))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, AssertionError, AttributeError])
def test_a_backward_pass_that_fails_is_said_to_be_one(error, self_check, route):
    batch = (torch.randn(3, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"backward pass fails in evaluation mode.*only in training mode"):
        ff.fisher_spectrum(FailsBackward(error), batch, route=route, self_check=self_check)


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_of_two_parameters_that_are_views_of_one_tensor_are_added_once(route):
    class Tables(Grows):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x).mean(1) + (self.one[None] + self.other[None])))

    found = ff.fisher_spectrum(Tables(), samples(300), route=route).metadata
    assert found["self_check"]["held"] and found["route"] == route


class CachedByShape(nn.Module):
    """What is made of a parameter is kept by its class, for each shape of the inputs."""

    kept: ClassVar = {}

    def __init__(self) -> None:
        super().__init__()
        type(self).kept.clear()
        self.table, self.linear, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.position = nn.Parameter(torch.randn(9, 4))
        self.double()

    def forward(self, input_ids):
        if tuple(input_ids.shape) not in self.kept:
            self.kept[tuple(input_ids.shape)] = self.linear(self.position[: input_ids.shape[1]])
        return self.head(torch.tanh(self.table(input_ids) + self.kept[tuple(input_ids.shape)]))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("shapes", [[(1, 5)], [(2, 5)], [(3, 5)], [(5, 5)], [(1, 8), (2, 5)], [(2, 4), (3, 6)]])
def test_what_is_kept_of_a_parameter_for_each_shape_is_refused(shapes, self_check, route):
    batches = [{"input_ids": torch.randint(7, shape)} for shape in shapes]
    with pytest.raises(ValueError, match="past the module's attributes"):
        ff.fisher_spectrum(CachedByShape(), batches, loss=ff.losses.causal_lm(), route=route, self_check=self_check)
