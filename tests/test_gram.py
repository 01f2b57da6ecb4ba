"""Gram algebra: every operation on K = G Gᵀ is the Gram of the same operation on the rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fisherfunc.linalg.gram import centred, gram_norm, gram_of, regrouped, reweighted, selected
from fisherfunc.testing import gradient_matrices


def assert_same_gram(got, rows, *, like):
    assert_close(got, rows @ rows.mT, atol=1e-13 * float(like.square().sum()), rtol=0)


def indices(data, rows):
    return torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)))


@given(gradient_matrices())
def test_the_gram_holds_the_inner_products_of_rows(rows):
    products = torch.tensor([[float(g @ h) for h in rows] for g in rows], dtype=rows.dtype)
    assert_close(gram_of(rows), products, atol=1e-14 * float(rows.square().sum()), rtol=0)


@given(gradient_matrices(dtype=torch.float32))
def test_accumulation_in_float64_rounds_nothing(rows):
    gram = gram_of(rows, dtype=torch.float64)
    assert gram.dtype == torch.float64 and gram_of(rows).dtype == torch.float32
    assert_same_gram(gram, rows.double(), like=rows.double())


@given(gradient_matrices())
def test_centring_the_gram_equals_centring_the_rows(rows):
    assert_same_gram(centred(gram_of(rows)), rows - rows.mean(dim=0), like=rows)


@given(gradient_matrices())
def test_a_centred_gram_has_no_mean_and_stays_when_centred_again(rows):
    once, tolerance = centred(gram_of(rows)), 1e-13 * float(rows.square().sum())
    assert_close(once.sum(dim=-1), torch.zeros(len(rows), dtype=rows.dtype), atol=tolerance, rtol=0)
    assert_close(centred(once), once, atol=tolerance, rtol=0)


@given(gradient_matrices(), st.data())
def test_selecting_from_the_gram_equals_selecting_rows(rows, data):
    index = indices(data, rows)
    assert_close(selected(gram_of(rows), index), gram_of(rows)[index][:, index], atol=0, rtol=0)
    assert_same_gram(selected(gram_of(rows), index), rows[index], like=rows)


@given(gradient_matrices(), st.data())
def test_regrouping_the_gram_equals_summing_rows(rows, data):
    group = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows))))
    summed = torch.stack([rows[group == g].sum(dim=0) for g in range(3)])
    assert_same_gram(regrouped(gram_of(rows), group, 3), summed, like=rows)


@given(gradient_matrices(), st.data())
def test_reweighting_the_gram_equals_scaling_rows(rows, data):
    weights = data.draw(st.lists(st.floats(-3, 3), min_size=len(rows), max_size=len(rows)))
    weights = torch.tensor(weights, dtype=rows.dtype)
    assert_same_gram(reweighted(gram_of(rows), weights), weights[:, None] * rows, like=3 * rows)


@given(gradient_matrices())
def test_the_norm_is_the_same_from_either_side(rows):
    want = torch.linalg.matrix_norm(rows @ rows.mT)
    assert_close(gram_norm(rows), want, atol=0, rtol=1e-12)
    assert_close(gram_norm(rows.mT), want, atol=0, rtol=1e-12)


@given(st.integers(1, 4), gradient_matrices())
def test_stacks_go_through_the_gram_and_its_centring(depth, rows):
    stack = torch.stack([(index + 1) * rows for index in range(depth)])
    want = torch.stack([centred(gram_of(one)) for one in stack])
    assert_close(centred(gram_of(stack)), want, atol=1e-13 * float(stack.square().sum()), rtol=0)
