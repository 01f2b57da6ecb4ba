"""Logits whose classes lie on axis 1, as torch has them, or on the last one: read where one fits, else asked about."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.gradients.losses import IGNORED

V = 3


def drawn(*positions, batch=2):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, V, *positions, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (batch, *positions), generator=generator)
    labels.view(-1)[::3] = IGNORED
    return logits, labels


@pytest.mark.parametrize("positions", [(), (5,), (4, 6), (V, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_the_shape_says_which_axis_holds_the_classes(positions, last):
    logits, labels = drawn(*positions)
    loss, given = ff.losses.classification(), logits.movedim(1, -1) if last else logits
    want = F.cross_entropy(logits, labels, reduction="none")
    valid = loss.valid((None, labels))
    assert torch.equal(valid, (labels != IGNORED).reshape(2, -1))
    assert_close(loss.values(given, (None, labels))[valid], want[labels != IGNORED], rtol=1e-12, atol=0)


@pytest.mark.parametrize("positions", [(V,), (V, V)], ids=str)
def test_as_many_classes_as_positions_are_asked_about_and_read_as_told(positions):
    logits, labels = drawn(*positions)
    with pytest.raises(ValueError, match=r"classification\(class_axis=1\) or classification\(class_axis=-1\)"):
        ff.losses.classification().values(logits, (None, labels))
    valid, want = labels != IGNORED, F.cross_entropy(logits, labels, reduction="none")
    for axis, given in ((1, logits), (-1, logits.movedim(1, -1))):
        got = ff.losses.classification(class_axis=axis).values(given, (None, labels)).reshape(labels.shape)
        assert_close(got[valid], want[valid], rtol=1e-12, atol=0)


class ByPosition(nn.Module):
    """Classes of each position, on axis 1."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.layer = nn.Conv1d(2, V, 1)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("size", [V, 5])
def test_the_spectrum_of_logits_with_classes_on_axis_1_is_that_of_a_loop(size, route):
    torch.manual_seed(0)
    model = ByPosition(size).double()
    x, y = torch.randn(3, 2, size, dtype=torch.float64), torch.randint(V, (3, size))
    rows = []
    for i in range(3):
        for value in F.cross_entropy(model(x[i : i + 1]), y[i : i + 1], reduction="none")[0]:
            grads = torch.autograd.grad(value, model.parameters(), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    want = torch.linalg.eigvalsh(torch.stack(rows).mT @ torch.stack(rows) / len(rows)).flip(0)
    loss = ff.losses.classification(class_axis=1)
    for given in (loss, *([] if size == V else [None])):
        found = ff.fisher_spectrum(model, (x, y), loss=given, route=route).full
        assert found.num_tokens == 3 * size
        assert_close(found.eigenvalues[: len(want)], want[: len(found.eigenvalues)], rtol=1e-9, atol=1e-12)
    if size == V:
        with pytest.raises(ValueError, match="class_axis"):
            ff.fisher_spectrum(model, (x, y), route=route)


@pytest.mark.parametrize("first", [True, False])
def test_pixels_are_tokens_with_classes_on_either_axis(first):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, V, 3, padding=1)
    model = nn.Sequential(conv, Last()) if not first else conv
    x, y = torch.randn(2, 2, 4, 5), torch.randint(V, (2, 4, 5))
    found = ff.fisher_spectrum(model, (x, y), num_tokens=8)
    assert found.metadata["num_valid_tokens"] == 2 * 4 * 5
    want = F.cross_entropy(conv(x), y).item()
    full = ff.fisher_spectrum(model, (x, y))
    assert full.metadata["mean_loss"] == pytest.approx(want, rel=1e-5)


class Last(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1)


@pytest.mark.parametrize("axis", [0, 3, -3])
def test_an_axis_that_logits_do_not_have_is_named(axis):
    logits, labels = drawn(5)
    with pytest.raises(ValueError, match=rf"class_axis={axis} is none of logits of shape \(2, 3, 5\)"):
        ff.losses.classification(class_axis=axis).values(logits, (None, labels))


def test_an_axis_that_does_not_fit_names_the_one_that_does():
    logits, labels = drawn(5)
    with pytest.raises(ValueError, match=r"classification\(class_axis=1\) fits"):
        ff.losses.classification(class_axis=-1).values(logits, (None, labels))


@pytest.mark.parametrize("labels", [torch.full((4,), 0.5), torch.rand(4, V)], ids=["of samples", "probabilities"])
def test_class_targets_of_a_float_dtype_are_refused_with_what_they_may_be(labels):
    with pytest.raises(ValueError, match=r"which are integers, got torch.float32.*CrossEntropyLoss\(\)"):
        ff.fisher_spectrum(nn.Linear(2, V), (torch.randn(4, 2), labels), loss=ff.losses.classification())


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
def test_logits_without_an_axis_of_classes_are_named(shape):
    with pytest.raises(ValueError, match=r"axis of classes.*binary_classification"):
        ff.losses.classification().values(torch.randn(shape), (None, torch.zeros(shape, dtype=torch.long)))
