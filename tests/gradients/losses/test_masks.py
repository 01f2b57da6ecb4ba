"""Masks of any kind leave in the same positions; what can be read in two ways is refused. Targets of any dtype."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import fisherfunc as ff

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] + [1] * 5])
IDS = torch.tensor([[156, 3, 156, 7, 8, 9], [1, 156, 2, 0, 4, 4], [5, 5, 199, 156, 1, 2]])
SMALL = torch.finfo(torch.float32).min
ADDED = {"1e9": -1e9, "inf": -torch.inf, "1e4": -1e4, "smallest": SMALL}


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(200, 3), nn.Linear(3, 200)

    def forward(self, input_ids, attention_mask=None):
        return self.out(self.embed(input_ids.long()).cumsum(1).tanh())


def losses(loss=None, **batch):
    """The losses of the valid tokens, in order."""
    torch.manual_seed(0)
    fn = ff.functionalize(Tiny())
    return ff.token_grams(fn, fn.params, batch, loss or ff.losses.causal_lm()).tokens.loss


KINDS = {
    "booleans": lambda: MASK.bool(),
    "bytes": lambda: MASK.to(torch.uint8),
    "floats": lambda: MASK.double(),
    "lists": lambda: MASK.tolist(),
    "array": lambda: MASK.numpy(),
} | {name: lambda value=value: torch.where(MASK.bool(), 0.0, value) for name, value in ADDED.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_any_kind_leave_in_the_same_tokens(kind):
    torch.manual_seed(0)
    logits = Tiny()(IDS)
    expected = [
        functional.cross_entropy(logits[b, s], IDS[b, s + 1])
        for b in range(3)
        for s in range(5)
        if MASK[b, s] and MASK[b, s + 1]
    ]
    got = losses(input_ids=IDS, attention_mask=KINDS[kind]())
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(3, 6), "has a row of zeros: nothing is attended to .* everything if it is added to scores"),
        (MASK * torch.tensor([[1.0], [1.0], [0.0]]), "has a row of zeros"),
        (MASK * 0.5, "attention_mask holds 0.5; expected 1 where"),
        ((MASK - 1) * 0.5, "attention_mask holds -0.5; expected 1 where"),
        (torch.where(MASK.bool(), 1.0, -1e9), "attention_mask holds 1; expected 1 where"),
        ((MASK - 1) * 10_000, "attention_mask holds negative integers; give booleans, or floats"),
        (torch.zeros(3, 1, 6, 6), r"a mask of 4 axes says which positions attend to which.*add labels to the batch"),
    ],
)
def test_masks_that_say_either_or_neither_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        losses(input_ids=IDS, attention_mask=mask)


def test_labels_say_which_tokens_count_where_the_mask_does_not():
    labels = torch.where(MASK.bool(), IDS, -100)
    got = losses(input_ids=IDS, attention_mask=torch.zeros(3, 1, 6, 6), labels=labels)
    assert torch.equal(got, losses(input_ids=IDS, labels=labels))


UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
SIGNED = (torch.int16, torch.int32)


@pytest.mark.parametrize("dtype", [*UNSIGNED, *SIGNED, torch.float64])
def test_targets_of_any_dtype_are_the_classes_that_they_name(dtype):
    ids = IDS.clone()
    expected = losses(input_ids=ids, labels=ids)
    assert len(expected) == 15
    assert torch.equal(losses(input_ids=ids, labels=ids.to(dtype)), expected)
    x, y = torch.randn(6, 5), IDS[0]
    torch.manual_seed(0)
    model = nn.Linear(5, 200)
    classes = ff.losses.classification()
    got, wanted = (ff.fisher_spectrum(model, (x, t), loss=classes).full for t in (y.to(dtype), y))
    assert torch.equal(got.eigenvalues, wanted.eigenvalues)


def test_ids_of_a_byte_a_token_are_targets_of_256_classes():
    ids = torch.tensor([[250, 3, 255, 156]])
    assert ff.losses.causal_lm().targets({"input_ids": ids.to(torch.uint8)}).tolist() == [[3, 255, 156]]


@pytest.mark.parametrize("labels", [torch.tensor([True, False, True]), [True, False, True], [1, 0, 1]])
def test_booleans_and_numbers_are_classes(labels):
    x, model = torch.randn(3, 5), nn.Linear(5, 2)
    got = ff.fisher_spectrum(model, (x, labels)).full.eigenvalues
    assert torch.equal(got, ff.fisher_spectrum(model, (x, torch.tensor([1, 0, 1]))).full.eigenvalues)
