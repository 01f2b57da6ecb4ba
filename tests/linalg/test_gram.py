"""Gram algebra: every operation on a Gram is the Gram of the same operation on the rows, and remembers its N."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jacrev, vmap
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import fisherfunc as ff
from fisherfunc.linalg.gram import centred, gram_norm, gram_of, of_rows, regrouped, selected, summed, weighted
from fisherfunc.testing import gradient_matrices


def assert_same_gram(got, rows, *, like):
    assert_close(got.matrix, rows @ rows.mT, atol=1e-13 * float(like.square().sum()), rtol=0)


def indices(data, rows):
    return torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)))


@given(gradient_matrices())
def test_the_gram_holds_the_inner_products_of_rows(rows):
    products = torch.tensor([[float(g @ h) for h in rows] for g in rows], dtype=rows.dtype)
    assert_close(gram_of(rows), products, atol=1e-14 * float(rows.square().sum()), rtol=0)
    gram = of_rows(rows)
    assert torch.equal(gram.matrix, gram_of(rows))
    assert (gram.num_units, gram.num_params, gram.precision) == (*rows.shape, rows.dtype)


@given(gradient_matrices(dtype=torch.float32))
def test_accumulation_in_float64_rounds_nothing(rows):
    gram = of_rows(rows, dtype=torch.float64)
    assert (gram.matrix.dtype, gram.precision, of_rows(rows).matrix.dtype) == (torch.float64, *2 * [torch.float32])
    assert_same_gram(gram, rows.double(), like=rows.double())


@given(gradient_matrices())
def test_centring_the_gram_equals_centring_the_rows(rows):
    once = centred(of_rows(rows))
    assert_same_gram(once, rows - rows.mean(dim=0), like=rows)
    assert_close(once.scale, torch.linalg.matrix_norm(gram_of(rows)), atol=0, rtol=1e-12)
    assert centred(once).scale is once.scale


@given(gradient_matrices())
def test_a_centred_gram_has_no_mean_and_stays_when_centred_again(rows):
    once, tolerance = centred(of_rows(rows)).matrix, 1e-13 * float(rows.square().sum())
    assert_close(once.sum(dim=-1), torch.zeros(len(rows), dtype=rows.dtype), atol=tolerance, rtol=0)
    assert_close(centred(ff.Gram(matrix=once, num_units=len(rows))).matrix, once, atol=tolerance, rtol=0)


@given(gradient_matrices(), st.data())
def test_selecting_from_the_gram_equals_selecting_rows(rows, data):
    index = indices(data, rows)
    chosen = selected(of_rows(rows), index)
    assert_close(chosen.matrix, gram_of(rows)[index][:, index], atol=0, rtol=0)
    assert_same_gram(chosen, rows[index], like=rows)
    assert chosen.num_units == len(index)
    mask = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, index, value=True)
    assert_same_gram(selected(of_rows(rows), mask), rows[mask], like=rows)


@given(gradient_matrices(), st.data())
def test_regrouping_the_gram_equals_summing_rows(rows, data):
    group = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows))))
    sums = torch.stack([rows[group == g].sum(dim=0) for g in range(3)])
    found = regrouped(of_rows(rows), group, 3)
    assert_same_gram(found, sums, like=rows)
    assert found.num_units == 3
    assert float(torch.linalg.matrix_norm(found.matrix)) <= float(found.scale) * (1 + 1e-12)


@given(gradient_matrices(), st.data())
def test_weighting_the_gram_equals_scaling_rows(rows, data):
    weights = data.draw(st.lists(st.floats(-3, 3), min_size=len(rows), max_size=len(rows)))
    weights = torch.tensor(weights, dtype=rows.dtype)
    found = weighted(of_rows(rows), weights)
    assert_same_gram(found, weights[:, None] * rows, like=3 * rows)
    assert found.num_units == len(rows)


@given(gradient_matrices(), st.data())
def test_grams_of_parts_of_the_columns_sum_to_that_of_all(rows, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, rows.shape[1]), max_size=3)))
    parts = torch.tensor_split(rows, cuts, dim=1)
    found = summed(of_rows(part) for part in parts)
    assert_same_gram(found, rows, like=rows)
    assert (found.num_units, found.num_params) == rows.shape
    assert summed([replace(of_rows(part), num_params=None) for part in parts]).num_params is None


def test_a_sum_has_the_coarsest_precision_and_the_norms_of_all():
    fine, coarse = of_rows(torch.eye(3).double()), of_rows(torch.eye(3))
    assert summed([fine, coarse]).precision == torch.float32 == summed([coarse, fine]).precision
    both = summed([fine, centred(fine)])
    assert_close(both.scale, 2 * torch.linalg.matrix_norm(fine.matrix), atol=0, rtol=1e-15)
    measured = replace(fine, error=torch.tensor(0.25))
    assert summed([measured, measured]).error == 0.5 and summed([measured, fine]).error is None


def test_the_error_of_a_gram_follows_its_rows():
    gram = replace(of_rows(torch.eye(4).double()), error=torch.tensor(0.25))
    assert centred(gram).error == selected(gram, [0, 2]).error == 0.25
    assert regrouped(gram, torch.tensor([0, 1, 0, 0]), 2).error == 0.75  # ‖M‖² = 3
    assert weighted(gram, torch.tensor([1.0, -2.0, 0.0, 1.0])).error == 1.0


def test_rows_of_one_unit_stay_together():
    gram = ff.Gram(matrix=torch.eye(6), num_units=3)  # two rows each
    assert selected(gram, [0, 1, 4, 5]).num_units == 2
    assert regrouped(gram, torch.tensor([0, 1, 0, 1, 2, 3]), 4).num_units == 2
    for wrong in ([0, 1, 2], []):
        with pytest.raises(ValueError, match=r"rows were chosen or made of 6 rows of 3 units; .* all rows of each"):
            selected(gram, torch.tensor(wrong, dtype=torch.long))


def test_grams_of_other_rows_are_not_summed():
    with pytest.raises(
        ValueError, match=r"the same rows, got num_units and shape \(2, .*\) and \(3, .*select the same"
    ):
        summed([of_rows(torch.eye(2)), of_rows(torch.eye(3))])
    with pytest.raises(ValueError, match="needs at least one, got none"):
        summed([])


@given(gradient_matrices())
def test_the_norm_is_the_same_from_either_side(rows):
    want = torch.linalg.matrix_norm(rows @ rows.mT)
    assert_close(gram_norm(rows), want, atol=0, rtol=1e-12)
    assert_close(gram_norm(rows.mT), want, atol=0, rtol=1e-12)


ALGEBRA = {
    "centred": centred,
    "selected": lambda gram: selected(gram, torch.tensor([0, 0, 0])),
    "summed": lambda gram: summed([gram, gram]),
    "weighted": lambda gram: weighted(gram, torch.arange(gram.matrix.shape[-1], dtype=gram.matrix.dtype)),
    "regrouped": lambda gram: regrouped(gram, torch.zeros(gram.matrix.shape[-1], dtype=torch.long), 2),
}


@pytest.mark.parametrize("name", ALGEBRA)
@pytest.mark.parametrize("prepared", [lambda gram: gram, lambda gram: centred(replace(gram, error=gram.matrix[0, 0]))])
@given(st.integers(1, 3), gradient_matrices())
def test_stacks_go_through_the_algebra_as_under_vmap(name, prepared, depth, rows):
    alone = [prepared(of_rows((index + 1) * rows)) for index in range(depth)]
    stack = pytree.tree_map(lambda *parts: torch.stack(parts), *alone)
    want = pytree.tree_map(lambda *parts: torch.stack(parts), *map(ALGEBRA[name], alone))
    for got in (ALGEBRA[name](stack), vmap(ALGEBRA[name])(stack)):
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        for ours, theirs in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            assert_close(ours, theirs, atol=1e-12 * depth**2 * float(rows.square().sum()), rtol=1e-12)


@pytest.mark.parametrize("name", ALGEBRA)
def test_the_algebra_is_linear_in_the_matrix_and_jacrev_sees_it(name):
    gram = of_rows(torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    derivative = jacrev(lambda matrix: ALGEBRA[name](replace(gram, matrix=matrix)).matrix)(gram.matrix)
    along = torch.einsum("ijkl,kl->ij", derivative, gram.matrix)
    assert_close(along, ALGEBRA[name](gram).matrix, atol=1e-13, rtol=1e-12)
