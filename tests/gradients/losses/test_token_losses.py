"""Token losses: which tokens count, what each costs, and which loss a model was made for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import terms, token_loss
from torch import nn
from zoo import CASES, build

import fisherfunc as ff
from fisherfunc.gradients.losses import IGNORED, logits_of

CATEGORICAL = ("causal_lm", "masked_lm", "seq2seq_lm")
VOCAB = 5


@st.composite
def token_batches(draw):
    """Ids, labels with holes, masks of either attention and of any dtype."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(VOCAB, shape, generator=source)
    holes = torch.rand(shape, generator=source) < draw(st.sampled_from([0.0, 0.5]))
    batch = {"input_ids": torch.randint(VOCAB, shape, generator=source), "labels": labels.masked_fill(holes, IGNORED)}
    for key in ("attention_mask", "decoder_attention_mask"):
        if draw(st.booleans()):
            mask = torch.rand(shape, generator=source) < 0.7
            batch[key] = mask.to(draw(st.sampled_from([torch.bool, torch.long, torch.float32])))
            if batch[key].is_floating_point():  # a row of zeros may be added to scores: test_masks.py
                batch[key][:, 0] = 1
    return batch, torch.randn(*shape, VOCAB, dtype=torch.float64, generator=source)


@pytest.mark.parametrize("kind", CATEGORICAL)
@given(token_batches())
def test_valid_tokens_and_their_losses_are_those_of_the_plain_rule(kind, drawn):
    batch, logits = drawn
    loss = getattr(ff.losses, kind)()
    expected = terms(kind, batch)
    assert loss.valid(batch).nonzero().tolist() == [[t.sequence, t.position] for t in expected]
    values = loss.values(logits, batch)
    for term in expected:
        plain = token_loss(kind, logits[term.sequence], term)
        torch.testing.assert_close(values[term.sequence, term.position], plain, rtol=1e-12, atol=1e-14)


def test_a_causal_target_is_the_next_token_and_labels_win_over_ids():
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert ff.losses.causal_lm().targets(batch).tolist() == [[2, 3]]
    assert ff.losses.causal_lm().targets({**batch, "labels": torch.tensor([[7, 8, 9]])}).tolist() == [[8, 9]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_may_be_of_any_integer_dtype(dtype):
    logits, ids = torch.randn(2, 3), torch.tensor([0, 2])
    got = ff.losses.classification().values(logits, (None, ids.to(dtype)))
    torch.testing.assert_close(got[:, 0], nn.functional.cross_entropy(logits, ids, reduction="none"))


def test_classification_of_each_position_and_of_each_sample():
    logits = torch.randn(2, 4, 3)
    labels = torch.tensor([[0, 1, IGNORED, 2], [1, 1, 0, 0]])
    loss = ff.losses.classification()
    assert loss.valid({"labels": labels, "attention_mask": torch.tensor([[1] * 4, [1, 0, 1, 1]])}).sum() == 6
    assert loss.values(logits, {"labels": labels}).shape == (2, 4)
    assert loss.values(logits[:, 0], {"labels": labels[:, 0]}).shape == (2, 1)


def test_regression_is_half_the_squared_error_of_a_sample():
    means, y = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    expected = ((means - y) ** 2).sum(dim=(1, 2)) / 2
    torch.testing.assert_close(ff.losses.regression().values(means, (None, y))[:, 0], expected, rtol=1e-6, atol=0)


def test_a_loss_of_your_own_counts_where_its_mask_says():
    loss = ff.losses.custom(lambda output, batch: output.abs(), valid=lambda batch: batch["keep"], name="absolute")
    batch = {"keep": torch.tensor([True, False])}
    assert loss.name == "absolute" and loss.valid(batch).tolist() == [[True], [False]]
    assert loss.values(torch.tensor([-1.0, 2.0]), batch).tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_logits_is_computed_in_float32(dtype):
    logits = torch.tensor([[3.0, -3.0]], dtype=dtype)
    value = ff.losses.classification().values(logits, (None, torch.tensor([0])))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(math.log1p(math.exp(-6)), rel=1e-4)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name != "lstm"])
def test_the_loss_of_every_architecture_is_inferred(name):
    model, batch = build(name)
    assert ff.losses.infer(model, batch).name == CASES[name].kind


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2),
        {"logits": torch.ones(2)},
        (torch.ones(2), "state"),
        [torch.ones(2)],
        type("Output", (), {"logits": torch.ones(2)})(),
        (torch.tensor(0.5), torch.ones(2), "state"),
        [torch.tensor(0.5), torch.tensor(0.1), torch.ones(2)],
    ],
)
def test_logits_are_found_in_any_output(output):
    assert torch.equal(logits_of(output), torch.ones(2))


@pytest.mark.parametrize("output", ["text", {}, (), {"last_hidden_state": torch.ones(2)}])
def test_an_output_without_logits_is_a_type_error_with_a_way_out(output):
    with pytest.raises(TypeError, match="a model without a head has no loss"):
        logits_of(output)


@pytest.mark.parametrize("output", [torch.tensor(0.5), (torch.tensor(0.5),), {"logits": torch.tensor(0.5)}])
def test_a_model_that_returns_a_reduced_loss_is_told(output):
    with pytest.raises(ValueError, match=r"returns one number, a loss that is reduced.*ff\.losses\.custom"):
        logits_of(output)


class LossFirst(nn.Module):
    """(loss, logits), as Transformers return without a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids):
        logits = self.out(self.embed(input_ids).cumsum(1))
        return nn.functional.cross_entropy(logits[:, :-1].mT, input_ids[:, 1:]), logits


def test_the_number_before_the_logits_is_passed_over():
    model, batch = LossFirst().double(), {"input_ids": torch.arange(10).reshape(2, 5) % 9}
    found = ff.fisher_spectrum(model, batch, loss=ff.losses.causal_lm())
    assert found.metadata["mean_loss"] == pytest.approx(model(**batch)[0].item(), rel=1e-9)


def pairs(output, batch):
    good, bad = output.chunk(2)
    return -nn.functional.logsigmoid(good[:, 0] - bad[:, 0])


def halves(output, batch):
    return output[:4, 0] - output[4:, 0]


def stacked(output, batch):
    return torch.stack([a - b for a, b in zip(output[::2, 0], output[1::2, 0], strict=False)])


LOSSES_OF_YOUR_OWN = {
    "pairs by chunk": (pairs, ValueError, r"a sample at a time.*\(pairs, 2, ...\)"),
    "pairs by halves": (halves, ValueError, r"a sample at a time.*\(pairs, 2, ...\)"),
    "pairs by strides": (stacked, ValueError, r"a sample at a time.*\(pairs, 2, ...\)"),
    "pairs by shape": (lambda o, b: o.view(-1, 2, 3)[:, 0, 0], ValueError, r"a sample at a time"),
    "reduced": (lambda o, b: nn.CrossEntropyLoss()(o, b[-1]), ValueError, "one number, reduced over tokens"),
    "mean": (lambda o, b: o.mean(), ValueError, "one number, reduced over tokens"),
    "of logits and targets": (lambda o, y: nn.functional.cross_entropy(o, y), ValueError, r"loss\(output, batch\)"),
    "of three": (lambda o, y, z: o, ValueError, r"called as loss\(output, batch\)"),
    "by a key that is not there": (lambda o, b: b["labels"], ValueError, r"a tuple \(\*inputs, targets\)"),
    "a number": (lambda o, b: o.sum().item(), TypeError, "got float"),
    "nothing": (lambda o, b: None, TypeError, "got NoneType"),
    "too many axes": (lambda o, b: o[:, None, :], ValueError, r"shape \(1, 1, 3\)"),
}


@pytest.mark.parametrize("name", LOSSES_OF_YOUR_OWN)
@pytest.mark.parametrize("size", [8, 40])
def test_a_function_that_gives_no_loss_a_sample_is_told_what_is_expected(name, size):
    loss, error, words = LOSSES_OF_YOUR_OWN[name]
    batch = torch.randn(size, 2), torch.randint(3, (size,))
    with pytest.raises(error, match=words):
        ff.fisher_spectrum(nn.Linear(2, 3), batch, loss=loss)


def test_pairs_on_an_axis_of_their_own_are_samples():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(2, 1), nn.Unflatten(0, (-1, 2))).double()
    batch = torch.randn(6, 2, 2, dtype=torch.float64), torch.zeros(6)
    found = ff.fisher_spectrum(model, batch, loss=lambda o, b: -nn.functional.logsigmoid(o[:, 0, 0] - o[:, 1, 0]))
    assert found.full.num_tokens == 6 and float(found.full.eigenvalues[0]) > 0


def test_a_loss_that_torch_func_cannot_transform_is_still_taken_by_ordinary_passes():
    def loss(output, batch):
        return output.square().sum(1) if output.sum().item() > -1e9 else output.sum(1)

    model, batch = nn.Linear(2, 3).double(), (torch.randn(4, 2, dtype=torch.float64), torch.zeros(4))
    got = ff.fisher_spectrum(model, batch, loss=loss, route="dense").full.eigenvalues
    want = ff.fisher_spectrum(model, batch, loss=lambda o, b: o.square().sum(1), route="dense").full.eigenvalues
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_mask_of_a_loss_of_ones_own_may_be_of_any_dtype(dtype):
    keep = torch.tensor([[1, 0, 1], [0, 1, 1]])
    loss = ff.losses.custom(lambda output, batch: output.square(), valid=lambda batch: batch[-1].to(dtype))
    fn = ff.functionalize(nn.Linear(2, 3).double())
    batch = (torch.randn(2, 2).double(), keep)
    for one in (batch, tuple(column[:1] for column in batch)):
        tokens = ff.token_grams(fn, fn.params, one, loss).tokens
        assert torch.equal(torch.stack([tokens.sequence, tokens.position], dim=1), one[-1].nonzero())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda batch: [True], r"valid of loss .* expected to return a tensor of booleans .* got list"),
        (lambda batch: torch.ones(1, 1, 1), r"tensor of booleans .* got of shape \(1, 1, 1\)"),
        (
            lambda batch: torch.tensor([[0.5]]),
            "expected booleans, or 0 and 1, got 0.5; .* weights into the loss itself",
        ),
        (lambda batch: torch.tensor([[2]]), "expected booleans, or 0 and 1, got 2; positions go as a mask"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    loss = ff.losses.custom(lambda output, batch: output.square().sum(-1), valid=mask)
    with pytest.raises((TypeError, ValueError), match=message):
        ff.fisher_spectrum(nn.Linear(2, 3), (torch.randn(1, 2), torch.zeros(1)), loss=loss)


def test_a_mask_of_a_loss_of_ones_own_cannot_write_to_the_batch():
    batch = (torch.randn(4, 2), torch.tensor([0, 1, 2, -1]))
    before = batch[1].clone()
    loss = ff.losses.custom(lambda output, batch: output.square().sum(-1), valid=lambda batch: batch[1].add_(1) != 0)
    assert ff.fisher_spectrum(nn.Linear(2, 3), batch, loss=loss).full.num_tokens == 3
    assert torch.equal(batch[1], before)
