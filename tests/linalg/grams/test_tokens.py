"""Groups of tokens as submatrices, and the tokens that carry an eigenvector."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from builders import grams_of
from explicit import flat_stack, loss_for
from hypothesis import given
from hypothesis import strategies as st
from oracle import gradient_rows, terms
from zoo import CASES, build

import fisherfunc as ff
from fisherfunc.testing import gradient_trees


@cache
def setting(name):
    model, batch = build(name, dtype=torch.float64)
    fn, loss = ff.functionalize(model), loss_for(name)
    return model, batch, loss, ff.token_grams(fn, fn.params, batch, loss)


def groups_of(grams, batch, loss):
    targets = ff.tokens.targets(grams.tokens, batch, loss)
    return {
        **({} if loss.name == "classification" else positions(grams)),
        "easy": ff.tokens.by_loss_quantile(grams, 0, 0.5),
        "hard": ff.tokens.by_loss_quantile(grams, 0.5, 1),
        "of a class": torch.isin(targets, targets[:2]),
        "any": torch.arange(grams.num_units) % 2 == 0,
    }


def positions(grams):
    return {"early": ff.tokens.by_position(grams, 0, 2), "late": ff.tokens.by_position(grams, 2)}


@pytest.mark.parametrize("name", ["lstm", "mlp"])
def test_the_spectrum_of_a_group_is_that_of_its_tokens_gradients(name):
    model, batch, loss, grams = setting(name)
    rows = gradient_rows(model, CASES[name].kind, batch)
    for mask in groups_of(grams, batch, loss).values():
        result = ff.spectrum_of_grams(grams.select(mask))
        alone = ff.spectrum_of_gradients({parameter: g[mask] for parameter, g in rows.items()})
        assert 0 < result.full.num_tokens == int(mask.sum()) < grams.num_units
        for found, expected in (
            (result.full, alone.full),
            *zip(result.blocks.values(), alone.blocks.values(), strict=True),
        ):
            torch.testing.assert_close(
                found.eigenvalues, expected.eigenvalues, rtol=0, atol=1e-11 * float(alone.full.eigenvalues[0])
            )


def test_groups_hold_what_they_say():
    _, batch, loss, grams = setting("lstm")
    expected = terms("causal_lm", batch)
    groups = groups_of(grams, batch, loss)
    assert groups["early"].tolist() == [term.position < 2 for term in expected]
    assert groups["late"].tolist() == [term.position >= 2 for term in expected]
    assert grams.tokens.loss[groups["easy"]].max() <= grams.tokens.loss[groups["hard"]].min()
    assert ff.tokens.targets(grams.tokens, batch, loss).tolist() == [term.target for term in expected]


@given(gradient_trees(), st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True))
def test_loss_quantiles_that_follow_each_other_share_nothing_and_leave_nothing_out(tree, cuts):
    grams = grams_of(tree)
    bounds = sorted({0.0, 1.0, *cuts})
    masks = [ff.tokens.by_loss_quantile(grams, *pair) for pair in itertools.pairwise(bounds)]
    assert torch.stack(masks).sum(0).tolist() == [1] * grams.num_units
    order = torch.cat([mask.nonzero().flatten() for mask in masks])
    assert order.tolist() == sorted(order.tolist())  # the losses of `grams_of` ascend


def test_groups_that_cannot_be_are_errors():
    _, batch, loss, grams = setting("lstm")
    summed = grams.by_sequence()
    with pytest.raises(ValueError, match="by_position expected rows of unit 'token', got 'sequence'"):
        ff.tokens.by_position(summed, 0, 2)
    with pytest.raises(ValueError, match="expected first < last, got first=2, last=2"):
        ff.tokens.by_position(grams, 2, 2)
    for low, high in ((-0.1, 1), (0.5, 0.5), (0, 1.1), (0, float("nan"))):
        with pytest.raises(ValueError, match=f"0 <= low < high <= 1, got low={low}, high={high}"):
            ff.tokens.by_loss_quantile(grams, low, high)
    with pytest.raises(ValueError, match="the rows are sequences"):
        ff.tokens.targets(summed.tokens, batch, loss)
    with pytest.raises(ValueError, match="'regression' has no target ids"):
        ff.tokens.targets(grams.tokens, batch, ff.losses.regression())
    with pytest.raises(ValueError, match="no target at sequence 0, position 0"):
        ff.tokens.targets(grams.tokens, {**batch, "labels": torch.full_like(batch["labels"], -100)}, loss)
    with pytest.raises(ValueError, match="no sequence 1 in this batch of 1"):
        ff.tokens.targets(grams.tokens, {key: value[:1] for key, value in batch.items()}, loss)


def decode(ids):
    return " ".join(map(str, ids))


def test_leading_tokens_are_those_of_the_largest_coefficients():
    model, batch, loss, grams = setting("lstm")
    pairs = ff.directions.eigenpairs(grams, num=2)
    rows = ff.directions.leading_tokens(pairs, batch, loss, top=3)
    fn, g = ff.functionalize(model), flat_stack(gradient_rows(model, "causal_lm", batch))
    v = flat_stack(ff.directions.eigenvectors(fn, fn.params, batch, loss, grams, num=2).vectors)
    along, expected = v @ g.mT, terms("causal_lm", batch)
    assert [row.vector for row in rows] == [0] * 3 + [1] * 3
    for row in rows:
        ranked = along[row.vector].abs().argsort(descending=True)[:3].tolist()
        assert row.row == ranked[rows.index(row) % 3]
        term = expected[row.row]
        assert (row.sequence, row.position, row.target) == (term.sequence, term.position, term.target)
        assert row.loss == pytest.approx(grams.tokens.loss[row.row].item())
        # λ = Σ_n ⟨g_n, v⟩²/N, of which the share of a token is what it adds
        share = along[row.vector, row.row] ** 2 / along[row.vector].square().sum()
        assert row.share == pytest.approx(share.item()) and row.share == pytest.approx(row.coefficient**2)
        assert row.eigenvalue == pytest.approx(float(along[row.vector].square().mean()))
        assert (row.text, row.before, row.after) == (None, None, None)
    everything = ff.directions.leading_tokens(pairs, batch, loss, top=99)
    assert sum(row.share for row in everything) == pytest.approx(2.0) and len(everything) == 2 * grams.num_units


def test_the_text_is_that_around_the_target():
    """Three sequences: a full one, one with padding and a hole, one of two tokens."""
    _, batch, loss, grams = setting("lstm")
    rows = ff.directions.leading_tokens(ff.directions.eigenpairs(grams), batch, loss, top=99, decode=decode, window=2)
    for row in rows:
        ids = batch["input_ids"][row.sequence][batch["attention_mask"][row.sequence].bool()].tolist()
        place = row.position + 1
        assert row.text == str(ids[place]) == str(row.target)
        assert row.before == decode(ids[max(0, place - 2) : place]) and row.after == decode(ids[place + 1 : place + 3])


def test_the_text_of_masked_and_of_translated_tokens():
    """Of masked models the true ids are shown, of translations the targets."""
    for name in ("bert", "t5"):
        _, batch, loss, grams = setting(name)
        expected = [int(term.target) for term in terms(CASES[name].kind, batch)]
        assert ff.tokens.targets(grams.tokens, batch, loss).tolist() == expected
        pairs = ff.directions.eigenpairs(grams)
        for row in ff.directions.leading_tokens(pairs, batch, loss, top=99, decode=decode, window=5):
            labels, here = batch["labels"][row.sequence], row.position
            text = labels
            if name == "bert":
                there = batch["attention_mask"][row.sequence].bool()
                text = torch.where((labels == -100) | ~there, batch["input_ids"][row.sequence], labels)
            assert row.text == str(int(text[here])) and row.before == decode(text[:here].tolist())


def test_padding_on_the_left_is_no_text():
    ids = torch.tensor([[0, 0, 5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    tree = {"w": torch.tensor([[1.0], [2.0], [3.0]])}
    grams = grams_of(tree, sequence=torch.zeros(3, dtype=torch.int64))
    tokens = replace(grams.tokens, position=torch.tensor([2, 3, 4]))
    pairs = ff.directions.eigenpairs(replace(grams, tokens=tokens))
    rows = ff.directions.leading_tokens(pairs, batch, ff.losses.causal_lm(), decode=decode)
    assert [(row.before, row.text, row.after) for row in rows] == [
        ("5 6 7", "8", ""),
        ("5 6", "7", "8"),
        ("5", "6", "7 8"),
    ]
    assert [row.share for row in rows] == pytest.approx([9 / 14, 4 / 14, 1 / 14])


def test_samples_and_sequences_have_no_text():
    _, batch, loss, grams = setting("mlp")
    row, *_ = ff.directions.leading_tokens(ff.directions.eigenpairs(grams), batch, loss, decode=decode)
    assert row.target == int(batch[1][row.row]) and row.text is None
    _, batch, loss, grams = setting("lstm")
    pairs = ff.directions.eigenpairs(grams.by_sequence())
    row, *_ = ff.directions.leading_tokens(pairs, batch, loss, decode=decode)
    assert (row.position, row.target, row.text) == (-1, None, None) and row.sequence == row.row


def test_leading_tokens_of_other_losses_or_none_are_errors():
    _, batch, loss, grams = setting("lstm")
    pairs = ff.directions.eigenpairs(grams)
    with pytest.raises(ValueError, match="of the loss 'causal_lm', got 'masked_lm'"):
        ff.directions.leading_tokens(pairs, batch, ff.losses.masked_lm())
    with pytest.raises(ValueError, match="top=0"):
        ff.directions.leading_tokens(pairs, batch, loss, top=0)
