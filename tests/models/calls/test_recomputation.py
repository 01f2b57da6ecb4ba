"""Checkpointing inside a model: gradients are those at the weights of the call, and torch is left as it was."""

import threading

import pytest
import torch
from oracle import gradient_rows, gram_errors
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

import fisherfunc as ff
from fisherfunc.models.calls import recomputation

ORIGINALS = dict(vars(torch_checkpoint))


class Checkpointed(nn.Module):
    """Two checkpointed layers, one inside the other, between two plain ones; `fail` raises inside."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.inner, self.last = (nn.Linear(n, m) for n, m in ((4, 8), (8, 8), (8, 8), (8, 3)))
        self.fail = False

    def forward(self, x):
        return self.last(checkpoint(self.outer, torch.tanh(self.first(x)), use_reentrant=False))

    def outer(self, x):
        if self.fail:
            raise KeyError("inside")
        return torch.tanh(self.middle(checkpoint(lambda y: torch.tanh(self.inner(y)), x, use_reentrant=False)))


class Attention(nn.Module):
    """What fused attention saves for the backward pass is another thing than what attention written out saves."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.last = nn.Embedding(9, 16), nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, ids):
        return self.last(checkpoint(self.attend, self.embed(ids), use_reentrant=False).mean(1))

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def drawn():
    torch.manual_seed(0)
    return Checkpointed(), (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_a_pass_in_another_dtype_is_that_of_the_model_in_it(route):
    model, (x, y) = drawn()
    result = ff.fisher_spectrum(model, (x, y), dtype=torch.float64, route=route, self_check=True)
    rows = torch.cat(list(gradient_rows(model.double(), "classification", (x.double(), y)).values()), dim=1)
    expected = torch.linalg.svdvals(rows).square() / len(rows)
    got = result.full.eigenvalues
    torch.testing.assert_close(got, expected[: len(got)], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_gradients_at_other_weights_are_those_of_a_model_that_has_them(route):
    model, batch = drawn()
    fn = ff.functionalize(model)
    params = {name: 3 * p + 0.1 for name, p in fn.params.items()}
    grams = ff.token_grams(fn, params, batch, ff.losses.classification(), route=route, self_check=True).grams
    other = drawn()[0]
    other.load_state_dict(params)
    assert max(gram_errors(grams, gradient_rows(other, "classification", batch), 1e-6).values()) <= 1e-4


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_attention_inside_a_checkpoint_is_not_computed_again_by_another_kernel(route):
    torch.manual_seed(0)
    model, batch = Attention(), (torch.randint(9, (6, 5)), torch.tensor([0, 1, 2, 0, 1, 2]))
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, batch, ff.losses.classification(), route=route, self_check=True).grams
    assert max(gram_errors(grams, gradient_rows(model, "classification", batch), 1e-6).values()) <= 1e-4


def test_torch_is_as_before_after_a_call_and_after_an_error():
    model, batch = drawn()
    ff.functionalize(model).apply({}, batch)
    assert all(vars(torch_checkpoint)[name] is value for name, value in ORIGINALS.items())
    model.fail = True
    with pytest.raises(KeyError, match="inside"):
        ff.functionalize(model).apply({}, batch)
    assert all(vars(torch_checkpoint)[name] is value for name, value in ORIGINALS.items())
    assert not recomputation._depth


def test_another_thread_goes_on_recomputing():
    forwards = []

    def train():
        model, (x, _) = drawn()
        model.middle.register_forward_hook(lambda *_: forwards.append(1))
        model(x).sum().backward()

    with recomputation.kept_activations(), recomputation.kept_activations():
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert len(forwards) == 2  # once forward, once again in the backward pass
        train()
        assert len(forwards) == 3
    train()
    assert len(forwards) == 5
