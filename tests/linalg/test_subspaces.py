"""Laws of projections onto subspaces of parameter space, and of the overlap of two of them."""

import math

import pytest
import torch
from explicit import flat, flat_stack, tree_of
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.linalg.subspaces import orthonormalised
from fisherfunc.linalg.trees import inner
from fisherfunc.testing.matrices import gaussian

SHAPES = {"w": torch.empty(2, 3), "b": torch.empty(2), "s": torch.empty(())}
P = 9


def stack_of(rows):
    """Rows `(k, p)` as {name: (k, *shape)}."""
    trees = [tree_of(row, SHAPES) for row in rows]
    return {name: torch.stack([tree[name] for tree in trees]) for name in SHAPES}


@st.composite
def subspaces(draw, k=None):
    k = draw(st.integers(1, P)) if k is None else k
    return stack_of(torch.linalg.qr(gaussian(draw, P, k)).Q.mT.contiguous())


@st.composite
def trees(draw):
    return tree_of(gaussian(draw, 1, P)[0], SHAPES)


@given(trees(), subspaces())
def test_a_projection_is_that_of_the_matrix(x, vectors):
    v, found = flat_stack(vectors), ff.directions.project(x, vectors)
    assert_close(found.coefficients, v @ flat(x), rtol=1e-12, atol=1e-12)
    assert_close(flat(found.tree), v.mT @ (v @ flat(x)), rtol=1e-12, atol=1e-12)
    assert_close(found.fraction, flat(found.tree).square().sum() / flat(x).square().sum(), rtol=1e-12, atol=1e-12)
    assert {n: t.shape for n, t in found.tree.items()} == {n: t.shape for n, t in SHAPES.items()}


@given(trees(), subspaces())
def test_projecting_twice_is_projecting_once_and_the_rest_is_orthogonal(x, vectors):
    once = ff.directions.project(x, vectors)
    twice = ff.directions.project(once.tree, vectors)
    assert_close(flat(twice.tree), flat(once.tree), rtol=0, atol=1e-11)
    assert_close(twice.fraction.item(), 1.0, rtol=0, atol=1e-8)
    rest = ff.directions.project({name: x[name] - once.tree[name] for name in x}, vectors)
    assert_close(rest.coefficients, torch.zeros_like(rest.coefficients), rtol=0, atol=1e-11)
    assert 0 <= once.fraction <= 1 + 1e-12


@given(st.data())
def test_the_whole_space_captures_all(data):
    x, vectors = data.draw(trees()), data.draw(subspaces(k=P))
    assert_close(flat(ff.directions.project(x, vectors).tree), flat(x), rtol=0, atol=1e-11)


@given(st.data())
def test_the_overlap_is_that_of_the_projectors(data):
    a, b = data.draw(subspaces()), data.draw(subspaces())
    found, back = ff.directions.subspace_overlap(a, b), ff.directions.subspace_overlap(b, a)
    pa, pb = (flat_stack(v).mT @ flat_stack(v) for v in (a, b))
    k = min(len(a["s"]), len(b["s"]))
    assert_close(found.overlap, (pa @ pb).trace() / k, rtol=0, atol=1e-12)
    assert_close(found.angles.cos().square().mean(), found.overlap, rtol=0, atol=1e-12)
    assert len(found.angles) == k and bool((found.angles.diff() >= 0).all())
    assert_close(found.angles, back.angles, rtol=0, atol=1e-7)
    assert found.angles.min() >= 0 and found.angles.max() <= math.pi / 2 + 1e-12


@given(st.data())
def test_the_overlap_does_not_depend_on_the_basis(data):
    a, k = data.draw(subspaces(k=3)), 3
    turned = stack_of(torch.linalg.qr(gaussian(data.draw, k, k)).Q @ flat_stack(a))
    found = ff.directions.subspace_overlap(a, turned)
    assert_close(found.overlap.item(), 1.0, rtol=0, atol=1e-12)
    assert float(found.angles.max()) < 1e-13  # an arc cosine alone would give 1e-8


@given(st.lists(st.floats(0, math.pi / 2), min_size=1, max_size=4))
def test_angles_are_those_built_in(angles):
    angles = torch.tensor(sorted(angles), dtype=torch.float64)
    k, eye = len(angles), torch.eye(P, dtype=torch.float64)
    b = angles.cos()[:, None] * eye[:k] + angles.sin()[:, None] * eye[k : 2 * k]
    found = ff.directions.subspace_overlap(stack_of(eye[:k]), stack_of(b))
    assert_close(found.angles, angles, rtol=0, atol=1e-12)
    assert_close(found.overlap, angles.cos().square().mean(), rtol=0, atol=1e-12)


def test_a_subspace_of_another_has_overlap_one_and_orthogonal_ones_zero():
    eye = torch.eye(P, dtype=torch.float64)
    within = ff.directions.subspace_overlap(stack_of(eye[:4]), stack_of(eye[1:3]))
    apart = ff.directions.subspace_overlap(stack_of(eye[:4]), stack_of(eye[4:]))
    assert within.overlap == 1 and within.angles.tolist() == [0, 0]
    assert apart.overlap == 0 and apart.angles.tolist() == pytest.approx([math.pi / 2] * 4)


@given(subspaces(), st.integers(0, 99))
def test_orthonormalising_moves_to_the_nearest_orthonormal_vectors(vectors, seed):
    v = flat_stack(vectors)
    noise = torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(seed))
    near = v + 0.03 / len(v) * noise
    found, error = orthonormalised(stack_of(near))
    left, _, right = torch.linalg.svd(near, full_matrices=False)
    assert_close(flat_stack(found), left @ right, rtol=0, atol=1e-11)  # the polar factor
    assert error == pytest.approx(float((near @ near.mT - torch.eye(len(v))).abs().max()), abs=1e-14)


def test_inner_products_sum_over_wide_tensors():
    wide = torch.randn(2, 3, 5000, generator=torch.Generator().manual_seed(0))
    assert_close(inner({"w": wide}, {"w": wide[:1]}), wide.flatten(1).double() @ wide[:1].flatten(1).double().mT)


def test_a_zero_tree_has_no_fraction():
    found = ff.directions.project({"w": torch.zeros(2)}, {"w": torch.eye(2)[:1]})
    assert found.fraction.isnan() and found.coefficients.tolist() == [0]


def test_what_does_not_fit_is_an_error_that_names_it():
    vectors = {"w": torch.eye(4)[:2].reshape(2, 2, 2), "b": torch.zeros(2, 3)}
    tree = {"w": torch.ones(2, 2), "b": torch.ones(3)}
    ff.directions.project(tree, vectors)
    with pytest.raises(ValueError, match="the tree lacks 'b', has 'c', which is not expected"):
        ff.directions.project({"w": tree["w"], "c": tree["b"]}, vectors)
    with pytest.raises(ValueError, match=r"the tree has 'w' of shape \(4,\), expected \(2, 2\)"):
        ff.directions.project({**tree, "w": torch.ones(4)}, vectors)
    with pytest.raises(ValueError, match="the second subspace lacks 'b'"):
        ff.directions.subspace_overlap(vectors, {"w": vectors["w"]})
    with pytest.raises(ValueError, match=r"the second subspace has 'b' of shape \(4,\), expected \(3,\)"):
        ff.directions.subspace_overlap(vectors, {**vectors, "b": torch.zeros(2, 4)})
    twice = {name: 2 * v for name, v in vectors.items()}
    with pytest.raises(ValueError, match=r"vectors expected orthonormal vectors, and an entry of VᵀV − I is 3.0e\+00"):
        ff.directions.project(tree, twice)
    with pytest.raises(ValueError, match="the first subspace expected orthonormal vectors"):
        ff.directions.subspace_overlap(twice, vectors)
    with pytest.raises(ValueError, match=r"one k >= 1 for all, got k=\{'w': 2, 'b': 1\}"):
        ff.directions.project(tree, {**vectors, "b": torch.zeros(1, 3)})
