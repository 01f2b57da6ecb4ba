"""Class losses of samples, one ordinary backward pass each, and Grams that are held against them."""

import torch
from oracle import gram_errors
from torch.nn import functional

import fisherfunc as ff

CLASSES = 3


def samples(count=6):
    """Inputs, and targets whose first and last have another class than some between."""
    return torch.randn(count, 5).double(), torch.tensor([1, 2, 0, 2, 1, 1])[:count]


def class_losses(predict, x, y):
    """The loss of each sample, b → its predictions `(1, v)`."""
    return [lambda b=b: functional.cross_entropy(predict(b), y[b : b + 1]) for b in range(len(x))]


def rows_of(model, losses):
    """{name: (N, P)} by ordinary backward passes, one loss after the other."""
    named = dict(model.named_parameters())
    found = [torch.autograd.grad(loss(), list(named.values()), materialize_grads=True) for loss in losses]
    return {name: torch.stack([g[i].flatten() for g in found]) for i, name in enumerate(named)}


def assert_grams(model, batch, losses, loss=None, **options):
    """The Grams of a batch are those of the rows of these losses, to the rounding of float64."""
    fn = ff.functionalize(model)
    got = ff.token_grams(fn, fn.params, batch, loss or ff.losses.classification(), **options).grams
    assert max(gram_errors(got, rows_of(model, losses), floor=1e-15).values()) < 1e-10
