"""Losses with a term at every position: rows of both Fishers against a loop of backward passes over positions."""

import pytest
import torch
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc import testing


def loop(model, losses):
    """The Gram of all parameters, of losses of one backward pass each."""
    parameters = list(model.parameters())
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, **options)]) for value in losses]
    return torch.stack(rows) @ torch.stack(rows).mT


def gram(model, batch, loss, targets=None):
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, batch, loss, targets=targets).block()


class Series(torch.nn.Module):
    """A value, or two, at every step, from all steps before it."""

    def __init__(self, values):
        super().__init__()
        self.inner, self.head = torch.nn.Linear(2, 3), torch.nn.Linear(3, values)

    def forward(self, x, attention_mask=None):
        return self.head(self.inner(x).cumsum(dim=1).tanh())


@pytest.mark.parametrize("values", [1, 2])
def test_a_squared_error_at_every_position_is_a_token_each(values):
    torch.manual_seed(0)
    model, x = Series(values).double(), torch.randn(2, 3, 2, dtype=torch.float64)
    y = torch.randn(2, 3, values, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"x": x, "attention_mask": mask, "labels": y}
    means = model(x)[mask.bool()]
    wanted = loop(model, (means - y[mask.bool()]).square().sum(dim=-1) / 2)
    assert_close(
        gram(model, batch, ff.losses.position_regression()), wanted, rtol=0, atol=1e-12 * float(wanted.trace())
    )
    every = loop(model, means.flatten())
    found = gram(model, batch, ff.losses.position_regression(), ff.targets.all_classes())
    assert_close(found, every, rtol=0, atol=1e-12 * float(every.trace()))


def test_outputs_and_targets_without_an_axis_of_values_are_one_value_a_position():
    model = torch.nn.Sequential(Series(1), torch.nn.Flatten(1)).double()
    x, y = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    result = ff.fisher_spectrum(model, (x, y), loss=ff.losses.position_regression())
    assert result.full.num_tokens == 6 and result.metadata["loss"] == "position_regression"
    wanted = loop(model, ((model(x) - y).square() / 2).flatten())
    assert_close(result.full.eigenvalues.sum(), wanted.trace() / 6, rtol=1e-10, atol=0)


def test_segmentation_has_its_classes_on_axis_1_also_where_shapes_leave_it_open():
    """Three classes on three by three pixels: nothing but the name tells the axis."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(1, 3, 3, padding=1).double()
    x, y = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.randint(3, (2, 3, 3))
    y[0, 0, 0] = -100
    log_p = model(x).log_softmax(dim=1).movedim(1, -1)[y != -100]
    wanted = loop(model, -log_p.gather(1, y[y != -100][:, None]).flatten())
    assert_close(gram(model, (x, y), ff.losses.segmentation()), wanted, rtol=0, atol=1e-12 * float(wanted.trace()))
    every = loop(model, (-(log_p / 2).exp().detach() * log_p).flatten())
    found = gram(model, (x, y), ff.losses.segmentation(), ff.targets.all_classes())
    assert_close(found, every, rtol=0, atol=1e-12 * float(every.trace()))


def test_other_shapes_are_refused_with_what_was_expected():
    loss = ff.losses.position_regression()
    with pytest.raises(ValueError, match=r"expected outputs of shape .* got \(2, 3, 4, 4\); bring the positions onto"):
        loss.predictions(torch.zeros(2, 3, 4, 4), None)
    with pytest.raises(ValueError, match=r"of one shape, got \(2, 3, 1\) and \(2, 4, 1\); give a target"):
        loss.values(torch.zeros(2, 3), (None, torch.zeros(2, 4)))


def test_the_laws_of_losses_hold():
    assert not testing.check_loss(ff.losses.position_regression(), examples=testing.value_outputs()).failures
