"""Which sequences run beside which before any gradient."""

import pytest
import torch
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.survey import survey


class DecidesByTheBatch(nn.Module):
    """Other predictions where the sum over the batch is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1.0 if x.sum() > 0 else 2.0)


@pytest.mark.parametrize("positive", [True, False])
def test_a_sample_without_a_token_is_seen_to_change_its_batch(positive):
    first = torch.tensor([0.1, -1.0 if not positive else 1.0])  # of the second no token counts
    others = torch.ones(2)
    batches = [(first[:, None, None].expand(2, 1, 3), torch.tensor([[1], [-100]]))]
    batches += [(others[:, None, None].expand(2, 1, 3), torch.tensor([[0], [3]]))]
    fn = ff.functionalize(DecidesByTheBatch())
    loss = ff.losses.classification()
    if positive:
        assert ff.token_grams(fn, fn.params, batches, loss).tokens.sequence.tolist() == [0, 2, 3]
        return
    with pytest.raises(ValueError, match=r"of sequences 0 to 1, at sequence 0.* depend on each other"):
        ff.token_grams(fn, fn.params, batches, loss)


class CountsTheBatch(DecidesByTheBatch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1.0 if len(x) < 4 else 2.0)


@pytest.mark.parametrize("self_check", [True, False])
def test_batches_of_two_that_run_together_in_the_pass_are_seen_to_meet_there(self_check):
    fn, loss = ff.functionalize(CountsTheBatch()), ff.losses.classification()
    batches = [(torch.randn(2, 3), torch.tensor([0, 1])) for _ in range(7)]
    with pytest.raises(ValueError, match="depend on each other"):
        ff.token_grams(fn, fn.params, batches, loss, self_check=self_check)


class Experts(nn.Module):
    """Each sample passes through the expert that its first feature names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        which = (x[:, 0] > 0).long()
        found = x.new_zeros(len(x), 4)
        for number in which.unique().tolist():
            here = which == number
            found = found.index_put((here.nonzero()[:, 0],), self.experts[number](x[here]))
        return found


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_parameters_that_other_samples_use_than_the_first_are_differentiated_by(route):
    torch.manual_seed(0)
    model, x, y = Experts().double(), torch.randn(6, 3).double(), torch.randint(4, (6,))
    x[:, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    fn = ff.functionalize(model, parameters="experts.1.*")
    grams = ff.token_grams(fn, fn.params, (x, y), ff.losses.classification(), route=route)
    names = [f"experts.1.{kind}" for kind in ("weight", "bias")]
    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for one, target in zip(x[:, None], y[:, None], strict=True):
        loss = nn.functional.cross_entropy(model(one), target)
        rows.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    for name, each in zip(names, zip(*rows, strict=True), strict=True):
        matrix = torch.stack(each).flatten(1)
        torch.testing.assert_close(grams.grams[name], matrix @ matrix.mT)
    assert int((grams.grams[names[0]].diagonal() > 0).sum()) == 2


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


def test_what_earlier_sequences_draw_is_seen_where_a_later_one_is_looked_at():
    torch.manual_seed(0)
    model, x, y = Experts(), torch.randn(6, 3), torch.randint(4, (6,))
    x[:, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    model.experts[0] = nn.Sequential(nn.Linear(3, 4), Noise())
    fn = ff.functionalize(model, parameters="experts.1.*")
    assert ff.token_grams(fn, fn.params, (x, y), ff.losses.classification()).num_units == 6


def test_where_no_sequence_uses_a_parameter_it_is_said_how_many_were_looked_at(monkeypatch):
    monkeypatch.setattr(survey, "MOST_LOOKED_AT", 2)
    x = torch.randn(6, 3)
    x[:, 0] = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    fn = ff.functionalize(Experts(), parameters="experts.1.*")
    with pytest.raises(ValueError, match=r"the losses of the 2 largest sequences, of 6, do not depend"):
        ff.token_grams(fn, fn.params, (x, torch.randint(4, (6,))), ff.losses.classification())
