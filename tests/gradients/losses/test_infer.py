"""Which loss a plain module is for, as its targets say; and what they leave open."""

import pytest
import torch
from torch import nn

import fisherfunc as ff
from fisherfunc.pipeline.fisher import token_loss

VOCAB = 50

PLAIN = {
    "classes": (3, torch.tensor([0, 2, 1, 1]), "classification"),
    "two classes": (2, torch.tensor([0, 1, 1, 1]), "classification"),
    "one logit": (1, torch.tensor([0, 1, 1, 0]), "binary_classification"),
    "one logit, a column": (1, torch.tensor([[0], [1], [1], [0]]), "binary_classification"),
    "one logit, all of one class": (1, torch.tensor([0, 0, 0, 0]), "binary_classification"),
    "one logit, bool": (1, torch.tensor([True, False, True, True]), "binary_classification"),
    "several labels": (3, torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]]), "binary_classification"),
    "real values": (2, torch.tensor([[0.5, 1.0], [2.0, 0.0], [1.0, 1.0], [0.0, -1.0]]), "regression"),
    "one real value": (1, torch.tensor([0.5, 2.0, 1.0, 0.0]), "regression"),
    "zeros": (2, torch.zeros(4, 2), "regression"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_targets_say_what_a_plain_module_is_for(name):
    outputs, y, kind = PLAIN[name]
    x, model = torch.randn(4, 5), nn.Linear(5, outputs)
    for batch in ((x, y), [(x[:1], y[:1]), (x[1:], y[1:])]):
        found = ff.fisher_spectrum(model, batch)
        assert found.metadata["loss"] == kind and found.full.num_tokens == 4


@pytest.mark.parametrize(
    ("outputs", "y", "both"),
    [
        (1, torch.tensor([0.0, 1.0, 1.0, 0.0]), ("binary_classification", "regression")),
        (3, torch.eye(4)[:, :3], ("binary_classification", "regression")),
        (3, torch.tensor([[0.2, 0.5, 0.3]] * 4), ("CrossEntropyLoss", "regression")),
        (3, torch.tensor([[0, 0, 1], [1, 0, 0]] * 2), ("argmax", "binary_classification")),
    ],
    ids=["floats 0 and 1", "multi-hot", "probabilities", "one-hot"],
)
def test_targets_that_may_be_labels_or_not_are_refused_with_both_readings(outputs, y, both):
    for batch in ((torch.randn(4, 5), y), {"input": torch.randn(4, 5), "labels": y}):
        with pytest.raises(ValueError, match=rf"{both[0]}\(\) or .*{both[1]}\(\)|{both[0]}.*{both[1]}"):
            ff.fisher_spectrum(nn.Linear(5, outputs), batch)


def test_ids_and_labels_of_one_shape_say_not_whether_labels_are_shifted():
    ids = torch.randint(VOCAB, (2, 7))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, VOCAB)

        def forward(self, input_ids, attention_mask):
            return self.embed(input_ids)

    with pytest.raises(
        ValueError, match=r"cannot tell which loss Plain was made for; pass loss=ff.losses.causal_lm\(\)"
    ):
        ff.fisher_spectrum(Plain(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def test_a_string_is_no_loss_and_names_the_one_that_it_may_be():
    with pytest.raises(TypeError, match=r"got the name 'classification': loss=ff.losses.classification\(\)"):
        token_loss("classification", nn.Linear(1, 1), ())
    with pytest.raises(TypeError, match=r"causal_lm\(\), .*got str 'cross-entropy'"):
        token_loss("cross-entropy", nn.Linear(1, 1), ())
