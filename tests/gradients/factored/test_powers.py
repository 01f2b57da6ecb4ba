"""Random powers of two: all of them, about equally often, the same for one seed."""

import pytest
import torch

from fisherfunc.gradients.factored.powers import random_powers


@pytest.mark.parametrize("exponents", [range(7), range(16), range(-30, 31)])
def test_all_powers_and_signs_come_about_equally_often(exponents):
    found = random_powers((201, 301), exponents, torch.Generator().manual_seed(0))
    values, counts = found.unique(return_counts=True)
    assert sorted(values.tolist()) == sorted(sign * 2.0**k for k in exponents for sign in (1, -1))
    expected = found.numel() / len(values)
    assert float((counts - expected).abs().max()) < 6 * expected**0.5


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (0,)])
def test_the_same_seed_gives_the_same(shape):
    one, other = (random_powers(shape, range(7), torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == shape and torch.equal(one, other)


def test_neighbours_are_independent():
    found = random_powers((4 * 10_000,), range(7), torch.Generator().manual_seed(0)).reshape(-1, 4)
    for lag in (1, 2, 3):  # drawn from one number
        equal = float((found[:, :-lag] == found[:, lag:]).double().mean())
        assert abs(equal - 1 / 14) < 0.005
