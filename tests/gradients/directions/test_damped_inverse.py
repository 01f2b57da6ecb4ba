"""The damped inverse of F against a dense linear solve, and as what undoes the damped product."""

import pytest
import torch
from explicit import fisher_of, flat, random_tree, setting
from hypothesis import given, settings
from hypothesis import strategies as st

import fisherfunc as ff

FEW = settings(max_examples=6)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_the_damped_inverse_is_that_of_a_linear_solve(name, center):
    fn, batch, loss, rows = setting(name, center=center)
    grams = ff.token_grams(fn, fn.params, batch, loss)
    grams = grams.center() if center else grams
    fisher, x = fisher_of(rows), random_tree(fn.params)
    for gamma in (1e-4, 0.1, 10.0):
        inverse = ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=gamma)
        damped = fisher + gamma * torch.eye(len(fisher), dtype=fisher.dtype)
        torch.testing.assert_close(flat(inverse(x)), torch.linalg.solve(damped, flat(x)), rtol=1e-8, atol=1e-10 / gamma)


def test_of_a_block_the_damped_inverse_is_that_of_its_block():
    fn, batch, loss, rows = setting("lstm")
    some = {name: p for name, p in fn.params.items() if name.startswith("lstm")}
    grams = ff.token_grams(fn, fn.params, batch, loss)
    inverse = ff.directions.damped_inverse(fn, some, batch, loss, grams, gamma=0.01)
    fisher, x = fisher_of(rows, some), random_tree(some)
    damped = fisher + 0.01 * torch.eye(len(fisher), dtype=fisher.dtype)
    torch.testing.assert_close(flat(inverse(x)), torch.linalg.solve(damped, flat(x)), rtol=1e-9, atol=1e-10)


@FEW
@given(st.floats(-3, 2), st.integers(0, 99))
def test_the_damped_inverse_undoes_the_damped_product(exponent, seed):
    fn, batch, loss, _ = setting("mlp")
    gamma, x = 10.0**exponent, random_tree(fn.params, seed)
    grams = ff.token_grams(fn, fn.params, batch, loss)
    inverse = ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=gamma)(x)
    product = ff.directions.fisher_vector_product(fn, fn.params, batch, loss)(inverse)
    torch.testing.assert_close(flat(product) + gamma * flat(inverse), flat(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damping_that_is_not_positive_is_an_error(gamma):
    fn, batch, loss, _ = setting("mlp")
    grams = ff.token_grams(fn, fn.params, batch, loss)
    with pytest.raises(ValueError, match=f"gamma expected a positive number, got gamma={gamma}"):
        ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=gamma)


def test_a_damping_below_the_resolution_is_an_error():
    fn, batch, loss, _ = setting("mlp", dtype=torch.float32)
    grams = ff.token_grams(fn, fn.params, batch, loss)
    with pytest.raises(ValueError, match=r"gamma=1e-12 is below the resolution \d\.\de-\d\d of these Grams"):
        ff.directions.damped_inverse(fn, fn.params, batch, loss, grams, gamma=1e-12)
