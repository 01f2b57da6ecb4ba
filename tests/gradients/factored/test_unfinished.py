"""Passes leave nothing behind: in the model, also where they are cut short at the output layer; and no graph."""

import gc

import pytest
import torch
from oracle import gradient_rows, gram_errors
from passes import grams
from token_models import Tokens, token_batch
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.factored import plan as plans


class Busy(Tokens):
    """A flag that the end of a call takes back."""

    busy = False

    def forward(self, input_ids):
        if self.busy:
            raise RuntimeError("called again before the end")
        self.busy = True
        logits = super().forward(input_ids)
        self.busy = False
        return logits


class Counted(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.kept = 0, []

    def forward(self, input_ids):
        self.depth += 1
        self.kept.append(self.between(self.embedding(input_ids), input_ids))
        logits = self.head(sum(self.kept)) * self.depth
        self.depth -= 1
        self.kept.clear()
        return logits


class Handled(Tokens):
    def forward(self, input_ids):
        x = self.between(self.embedding(input_ids), input_ids)
        try:
            return self.head(x)
        except BaseException:
            return self.other_head(torch.sin(x))


class Replaced(Tokens):
    def forward(self, input_ids):
        try:
            return super().forward(input_ids)
        except BaseException as error:
            raise RuntimeError("the layer failed") from error


class Supervised(Tokens):
    """The head is used for every layer, and once for nothing."""

    def forward(self, input_ids):
        x = self.between(self.embedding(input_ids), input_ids)
        self.head(x)
        return self.head(x) + self.head(self.middle(x))


@pytest.mark.parametrize("kind", [Busy, Counted, Handled, Replaced, Supervised])
def test_a_pass_that_is_cut_short_leaves_nothing_behind(kind):
    model, batch = kind().double(), token_batch()
    result = grams(model, batch, "causal_lm", chunk_size=2)
    assert result.metadata["route"] == "factored"
    errors = gram_errors(result.grams, gradient_rows(model, "causal_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors


def graph_nodes() -> int:
    """How many nodes of graphs there are, after whatever is garbage went."""
    gc.collect()
    return sum("Backward" in type(something).__name__ for something in gc.get_objects())


CALLS = {
    "factored": ff.fisher_spectrum,
    "dense": lambda model, batch: ff.fisher_spectrum(model, batch, route="dense"),
    "sequences": lambda model, batch: ff.fisher_spectrum(model, batch, unit="sequence"),
    "plan": ff.plan,
    "eigenvectors": ff.fisher_eigenvectors,
}


@pytest.mark.parametrize("call", CALLS)
def test_no_graph_outlives_its_call(call):
    model, batch = build("gpt2")
    CALLS[call](model, batch)
    before = graph_nodes()
    CALLS[call](model, batch)
    assert graph_nodes() == before


def test_a_call_that_fails_leaves_no_attribute_behind():
    class Fails(Counted):
        def between(self, x, input_ids):
            self.seen = x
            return {6: x}[x.shape[1]]

    fn = ff.functionalize(Fails())
    expected = fn.apply(fn.params, token_batch())
    for _ in range(2):
        with pytest.raises(KeyError):
            fn.apply(fn.params, {"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    torch.testing.assert_close(fn.apply(fn.params, token_batch()), expected, rtol=0, atol=0)


class Tied(Tokens):
    """The embedding is a linear map as well, and padding ids have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.padding_idx = 0

    def between(self, x, input_ids):
        logits = torch.nn.functional.linear(x, self.embedding.weight)
        return torch.tanh(self.middle(torch.tanh(logits) @ self.embedding.weight))


def test_a_sequence_of_padding_alone_is_taken(monkeypatch):
    monkeypatch.setattr(plans, "formed_cheaper", lambda *_: [])
    model, batch = Tied().double(), token_batch()
    batch["input_ids"][1] = 0
    result = grams(model, batch, "causal_lm")
    errors = gram_errors(result.grams, gradient_rows(model, "causal_lm", batch), floor=1e-16)
    assert max(errors.values()) < 1e-10, errors
