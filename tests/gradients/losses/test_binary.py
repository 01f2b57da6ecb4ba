"""Binary and multi-label classification: its loss, its true Fisher, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from true_fisher import assert_unbiased, by_draw, pass_rows

import fisherfunc as ff
from fisherfunc.gradients.losses.predictive import predictive

ROUTES = ["factored", "dense"]


def several(num_labels, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, num_labels)).double()
    return model, (torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4, num_labels)).to(dtype))


def rows_of(model, x, of_sample):
    """Σ rows rowᵀ over samples, by ordinary backward passes of the scalars that a function makes of the logits."""
    rows = []
    for i in range(len(x)):
        for value in of_sample(model(x[i : i + 1])[0], i):
            grads = torch.autograd.grad(value, model.parameters(), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.long, torch.bool])
def test_a_sample_is_a_token_with_the_sum_of_its_binary_cross_entropies(num_labels, dtype, route):
    model, (x, y) = several(num_labels, dtype)

    def by_hand(logits, i):
        p = logits.sigmoid()
        return [-(torch.where(y[i].bool(), p, 1 - p)).log().sum()]

    rows = rows_of(model, x, by_hand)
    want = torch.linalg.eigvalsh(rows @ rows.mT / 4).flip(0)
    for labels in (y, y[:, 0]) if num_labels == 1 else (y,):
        found = ff.fisher_spectrum(model, (x, labels), loss=ff.losses.binary_classification(), route=route).full
        assert found.num_tokens == 4
        assert_close(found.eigenvalues, want[: len(found.eigenvalues)], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("num_labels", [1, 3])
def test_all_classes_are_the_expectation_over_every_outcome(num_labels, route):
    """Σ over the 2^v outcomes y of p(y) ∇ℓ_y ∇ℓ_yᵀ."""
    model, (x, y) = several(num_labels)
    outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * num_labels).reshape(-1, num_labels).double()

    def each(logits, i):
        log_p = -F.binary_cross_entropy_with_logits(logits.expand_as(outcomes), outcomes, reduction="none").sum(1)
        return (log_p / 2).exp().detach() * log_p

    rows = rows_of(model, x, each)
    truth = rows.mT @ rows / 4
    loss, targets = ff.losses.binary_classification(), ff.targets.all_classes()
    found = ff.fisher_spectrum(model, (x, y), loss=loss, targets=targets, route=route)
    want = torch.linalg.eigvalsh(truth).flip(0)[: len(found.full.eigenvalues)]
    assert_close(found.full.eigenvalues, want, rtol=1e-9, atol=1e-13)
    assert found.full.num_tokens == 4 and found.metadata["fisher"] == "true (exact)"


def test_draws_are_unbiased_for_the_true_fisher():
    model, batch = several(2)
    model = model[0]
    loss = ff.losses.binary_classification()
    _, exact = pass_rows(model, batch, loss, ff.targets.all_classes())
    work, rows = pass_rows(model, batch, loss, ff.targets.sampled(1000))
    assert_unbiased(by_draw(rows, 1000, 4), exact.mT @ exact / 4)
    drawn = work.tokens.target.reshape(4, 1000, 2)
    p = model(batch[0]).detach().sigmoid()
    assert ((drawn == 0) | (drawn == 1)).all()
    assert ((drawn.mean(1) - p).abs() <= 5 * (p * (1 - p) / 1000).sqrt()).all()


def test_a_logit_that_is_certain_has_no_row_and_draws_its_class():
    logits = torch.tensor([[[torch.inf, -torch.inf, 0.0, 500.0]]], requires_grad=True)
    family = predictive(ff.losses.binary_classification())
    every = family.every(logits)
    (gradient,) = torch.autograd.grad(every.sum(), logits)
    assert every[0, :2].tolist() == [0.0, 0.0] and gradient[0, 0].tolist() == [
        0.0,
        0.0,
        0.5,
        pytest.approx(0, abs=1e-38),
    ]
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)[None, :, None].expand(1, 2, 4)
    assert family.draw(logits[0], ends).tolist() == [[[1, 0, 1, 1], [1, 0, 0, 1]]]


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, -100.0])
def test_targets_that_are_not_0_or_1_are_refused(value):
    model, (x, y) = several(3)
    y[2, 1] = value
    with pytest.raises(ValueError, match=rf"expected targets 0 or 1, got {value:g}; .*BCEWithLogitsLoss"):
        ff.fisher_spectrum(model, (x, y), loss=ff.losses.binary_classification())


def test_the_loss_of_large_logits_and_of_half_precision_is_finite():
    loss, y = ff.losses.binary_classification(), torch.tensor([[1.0]])
    assert loss.values(torch.tensor([[-1000.0]]), (None, y)).item() == 1000.0
    half = loss.values(torch.tensor([[3.0]], dtype=torch.bfloat16), (None, y))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(torch.tensor(-3.0).exp().log1p().item(), rel=1e-5)
