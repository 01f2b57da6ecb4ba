"""A model whose predictions depend on the targets gets them; one that ignores them does not."""

from types import SimpleNamespace

import pytest
import torch
from loops import CLASSES, assert_grams, class_losses, samples
from torch import nn
from torch.nn import functional

import fisherfunc as ff
from fisherfunc.gradients.survey.prepare import ROUTES


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Margin(nn.Module):
    """A head whose margin depends on the label: of all classes, or of class 0 alone."""

    def __init__(self, margins=(0.5, 0.3, 0.4)):
        super().__init__()
        self.layer, self.margins = nn.Linear(5, CLASSES).double(), margins

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if labels is None:
            return logits
        return logits - functional.one_hot(labels, CLASSES) * torch.tensor(self.margins, dtype=x.dtype)


class Required(Margin):
    def forward(self, x, labels):
        return super().forward(x, labels)


class Target(Margin):
    def forward(self, x, target=None):
        return super().forward(x, target)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model", [Margin(), Margin((0.5, 0.0, 0.0)), Required(), Target()])
def test_a_model_that_uses_the_labels_gets_them(model, route):
    x, y = samples()
    losses = class_losses(lambda b: model(x[b : b + 1], y[b : b + 1]), x, y)
    assert_grams(model, (x, y), losses, route=route)
    if not isinstance(model, Target):
        assert_grams(model, {"x": x, "labels": y}, losses, route=route)


class Shared(list):
    """A list that the copies of a module have in common."""

    def __deepcopy__(self, memo):
        return self


class Counting(nn.Module):
    """Its predictions do not depend on the labels; it counts how often it gets them, and fails at those of class 2."""

    def __init__(self, seen):
        super().__init__()
        self.layer, self.seen = nn.Linear(5, CLASSES).double(), seen

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if labels is not None:
            self.seen.append(len(labels))
            functional.cross_entropy(logits[:, :2], labels)
        return logits


def test_a_model_that_ignores_the_labels_gets_them_in_the_trial_alone():
    few, many = Shared(), Shared()
    x, y = samples()
    for seen, times in ((few, 1), (many, 5)):
        model = Counting(seen)
        fn = ff.functionalize(model)
        grams = ff.token_grams(fn, fn.params, (x.repeat(times, 1), y.repeat(times)), ff.losses.classification())
        assert grams.tokens.loss.shape == (6 * times,)
    assert 0 < len(few) == len(many)


def test_a_model_that_fails_with_the_labels_is_refused_with_both_ways_out():
    x, y = samples()
    with pytest.raises(
        ValueError, match=r"one_hot.*so whether its predictions depend on them cannot be seen; give .* or"
    ):
        ff.fisher_spectrum(Margin(), (x, y.to(torch.uint8)))


def test_a_model_without_predictions_but_with_its_targets_gets_them():
    class Last(nn.Module):  # as nanoGPT: without targets, the logits of the last position alone
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 4).double(), nn.Linear(4, 7).double()

        def forward(self, idx, targets=None):
            hidden = self.embed(idx).cumsum(1).tanh()
            return (self.out(hidden), 0.0) if targets is not None else (self.out(hidden[:, [-1]]), None)

    model, ids = Last(), torch.randint(7, (2, 4))
    targets = ids.roll(-1, 1)
    losses = [
        lambda b=b, s=s: functional.cross_entropy(model(ids[b : b + 1], 1)[0][0, s : s + 1], targets[b, s : s + 1])
        for b in range(2)
        for s in range(4)
    ]
    assert_grams(model, {"idx": ids, "targets": targets}, losses, ff.losses.masked_lm())


def test_a_wrapped_model_that_shifts_its_labels_into_the_decoder_gets_them():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 4).double(), nn.Linear(4, 7).double()

        def forward(self, input_ids, labels=None):
            shifted = (input_ids if labels is None else labels).roll(1, 1)
            return SimpleNamespace(logits=self.out(self.embed(input_ids).mean(1, keepdim=True) + self.embed(shifted)))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Decoder()

        def forward(self, **inputs):
            return self.net(**inputs)

    model, ids, labels = Wrapped(), torch.randint(7, (2, 4)), torch.randint(7, (2, 4))
    losses = [
        lambda b=b, s=s: functional.cross_entropy(
            model(input_ids=ids[b : b + 1], labels=labels[b : b + 1]).logits[0, s : s + 1], labels[b, s : s + 1]
        )
        for b in range(2)
        for s in range(4)
    ]
    assert_grams(model, {"input_ids": ids, "labels": labels}, losses, ff.losses.seq2seq_lm())


def test_keyword_arguments_that_nothing_inside_takes_are_not_given():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, CLASSES).double()

        def forward(self, **inputs):
            return self.layer(**inputs)

    model, (x, y) = Wrapped(), samples()
    losses = class_losses(lambda b: model(input=x[b : b + 1]), x, y)
    assert_grams(model, {"input": x, "labels": y}, losses)


@pytest.mark.parametrize("model", [Margin(), Required()])
@pytest.mark.parametrize("targets", [ff.targets.sampled(1), ff.targets.all_classes()])
def test_predictions_from_the_targets_have_no_true_fisher(model, targets):
    with pytest.raises(ValueError, match="predicts from the targets that it is given"):
        ff.fisher_spectrum(model, samples(), targets=targets)


class Reads(nn.Module):
    """Each position sees the label before it, as far as that is one of `seen`."""

    def __init__(self, seen, together=True):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4).double(), nn.Linear(4, 7).double()
        self.seen, self.together = seen, together

    def forward(self, input_ids, labels=None):
        if len(input_ids) > 1 and not self.together:
            raise ValueError("one at a time")
        hidden = self.embed(input_ids)
        if labels is not None:
            shown = torch.isin(labels, torch.tensor(self.seen)).roll(1, 1)
            hidden = hidden + self.embed(labels.roll(1, 1).clamp(min=0)) * shown[..., None]
        return self.out(hidden.sin())


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("seen", [[6], [1, 2, 3, 4, 5, 6]])
def test_labels_that_are_used_in_the_middle_of_a_batch_alone_are_given(seen, together):
    model, ids, labels = Reads(seen, together), torch.randint(7, (5, 4)), torch.randint(6, (5, 4))
    labels[2, 1] = 6
    labels[0], labels[-1, :3] = -100, -100  # no label of theirs is seen
    losses = [
        lambda b=b, s=s: functional.cross_entropy(
            model(ids[b : b + 1], labels[b : b + 1])[0, s : s + 1], labels[b, s : s + 1]
        )
        for b in range(5)
        for s in range(4)
        if labels[b, s] != -100
    ]
    assert_grams(model, {"input_ids": ids, "labels": labels}, losses, ff.losses.masked_lm())
