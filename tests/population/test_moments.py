"""Moments and leading eigenvalues of the population: loops over cycles of distinct sequences, and explicit refits."""

import json
from itertools import product
from math import prod

import pytest
import torch
from builders import grams_of
from hypothesis import given
from hypothesis import strategies as st

import fisherfunc as ff
from fisherfunc.population import LeadingSums
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.leading import held_out
from fisherfunc.population.moments import moments_of
from fisherfunc.testing import clustered_grams

SIZES = [2, 1, 3, 1, 2, 1]


def sample(sizes=SIZES, num_params=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    shared = torch.randn(len(sizes), num_params, generator=generator, dtype=torch.float64)
    own = torch.randn(len(sequence), num_params, generator=generator, dtype=torch.float64)
    return shared[sequence] + own, sequence


def cycles(rows, sequence, order, without=()):
    """The mean product of inner products around cycles of `order` tokens of distinct sequences, in all orders."""
    gram, of = (rows @ rows.mT).tolist(), sequence.tolist()
    tokens = [n for n in range(len(of)) if of[n] not in without]
    found = [
        prod(gram[n][m] for n, m in zip(cycle, cycle[1:] + cycle[:1], strict=True))
        for cycle in product(tokens, repeat=order)
        if len({of[n] for n in cycle}) == order
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_moments_are_those_of_a_loop_over_cycles_with_and_without_each_sequence(order):
    rows, sequence = sample()
    grams = grams_of({"w": rows}, sequence=sequence)
    found = moments_of(grams.block(), clusters_of(grams, None, "it"))
    assert found.values[order - 2].item() == pytest.approx(cycles(rows, sequence, order), rel=1e-10)
    for s in range(len(SIZES)):
        want = cycles(rows, sequence, order, [s])
        assert found.left_out[order - 2, s].item() == pytest.approx(want, rel=1e-9)
    estimate = ff.population.moments(grams)[order - 1].estimate
    assert estimate == pytest.approx(max(cycles(rows, sequence, order), 0), rel=1e-10)


def test_the_first_moment_is_the_trace_and_the_second_the_squared_norm():
    rows, sequence = sample()
    grams = grams_of({"w": rows}, sequence=sequence)
    first, second = ff.population.moments(grams, num=2)
    assert first.estimate == pytest.approx(rows.square().sum().item() / len(rows))
    norm = ff.population.squared_norm(grams).full
    assert (second.estimate, second.low, second.high) == pytest.approx((norm.estimate, norm.low, norm.high))


def test_moments_are_unbiased():
    """Of many samples the mean is that of the population within four of its standard errors."""
    eigenvalues, count = [3.0, 1.0, 0.5], 300
    found = torch.zeros(count, 4, dtype=torch.float64)
    for seed in range(count):
        grams = clustered_grams(eigenvalues, num_sequences=6, num_tokens=2, correlation=0.5, seed=seed)
        moments = moments_of(grams.block(), clusters_of(grams, None, "it"))
        found[seed] = torch.stack([grams.block().trace() / 12, *moments.values])
    truth = torch.tensor([sum(x**k for x in eigenvalues) for k in range(1, 5)], dtype=torch.float64)
    assert bool(((found.mean(0) - truth).abs() < 4 * found.std(0) / count**0.5).all())


@given(st.permutations(range(len(SIZES))), st.integers(0, 5))
def test_the_order_of_sequences_changes_nothing(order, seed):
    rows, sequence = sample(seed=seed)
    renamed = torch.tensor(order)[sequence]
    by_name = renamed.argsort(stable=True)
    before = grams_of({"w": rows}, sequence=sequence)
    after = grams_of({"w": rows[by_name]}, sequence=renamed[by_name])
    for one, other in zip(ff.population.moments(before), ff.population.moments(after), strict=True):
        assert (one.estimate, one.low, one.high) == pytest.approx((other.estimate, other.low, other.high), rel=1e-6)
    one, other = ff.population.leading_sums(before, num=2), ff.population.leading_sums(after, num=2)
    assert one.in_sample == pytest.approx(other.in_sample, rel=1e-6)


@pytest.mark.parametrize("sizes", [SIZES, [4, 4, 4], [1] * 7, [1] * 60])
def test_directions_out_of_sample_are_those_of_explicit_refits(sizes):
    rows, sequence = sample(sizes, num_params=9)
    grams = grams_of({"w": rows}, sequence=sequence)
    folds = min(50, len(sizes))
    fold = torch.arange(len(sizes)).mul(folds).div(len(sizes), rounding_mode="floor")[sequence]
    outside, without = torch.zeros(2), []
    for s in range(folds):
        rest = rows[fold != s]
        values, vectors = torch.linalg.eigh(rest.mT @ rest)
        without.append(values.flip(0)[:2] / len(rest))
        outside = outside + (rows[fold == s] @ vectors.flip(1)[:, :2]).square().sum(dim=0)
    found = held_out(grams.block(), clusters_of(grams, None, "it"), 2)
    # Ritz values that stopped moving at 1e-9 stand for vectors that are off by the root of that
    torch.testing.assert_close(found.without, torch.stack(without), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.eigenvalues, outside / len(rows), rtol=1e-3, atol=0)
    torch.testing.assert_close(
        found.inside, torch.linalg.eigvalsh(rows.mT @ rows).flip(0)[:2] / len(rows), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("sizes", "num_params"), [(SIZES, 9), ([4, 4, 4], 2), ([1] * 60, 9)])
def test_directions_out_of_sample_are_the_same_in_the_basis_of_eigenvectors(sizes, num_params):
    """Also where directions are fewer than are asked for, and one sequence is a thousand times as large."""
    rows, sequence = sample(sizes, num_params=num_params)
    rows[sequence == 1] *= 1e3
    grams = grams_of({"w": rows}, sequence=sequence)
    gram, clusters = grams.block(), clusters_of(grams, None, "it")
    one = held_out(gram, clusters, 4)
    other = held_out(gram, clusters, 4, eigenpairs=torch.linalg.eigh(gram))
    error = 1e-10 * float(
        one.inside[0]
    )  # of round-off of the largest eigenvalue, in a thousand times the smallest rest
    torch.testing.assert_close(one.without, other.without, rtol=1e-6, atol=error)
    torch.testing.assert_close(one.inside, other.inside, rtol=1e-6, atol=error)
    # vectors are off by the root of what Ritz values are
    torch.testing.assert_close(one.eigenvalues, other.eigenvalues, rtol=1e-3, atol=error)


def test_more_eigenvalues_than_the_rank_are_zero():
    grams = grams_of({"w": sample([1] * 8, num_params=2)[0]})
    found = ff.population.leading_sums(grams, num=4)
    assert found.in_sample[2:] == pytest.approx((0, 0), abs=1e-9 * found.in_sample[0])
    assert found.sums[3].low == pytest.approx(found.sums[1].low)


def test_rank_one_is_between_ends_that_meet():
    """One direction, one norm: every moment and every direction out of sample is the eigenvalue."""
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1], dtype=torch.float64)
    grams = grams_of({"w": signs[:, None] * torch.tensor([[1.0, 2.0]], dtype=torch.float64)})
    found = ff.population.leading_eigenvalue(grams)
    assert (found.estimate, found.low, found.high) == (None, pytest.approx(5), pytest.approx(5))


def test_zero_grams_have_zero_eigenvalues():
    grams = grams_of({"w": torch.zeros(5, 3, dtype=torch.float64)})
    found = ff.population.leading_eigenvalue(grams)
    assert (found.low, found.high) == (0, 0)
    assert [(e.low, e.high) for e in ff.population.leading_sums(grams, num=2).sums] == [(0, 0), (0, 0)]
    assert [e.estimate for e in ff.population.moments(grams)] == [0, 0, 0, 0]


def test_three_sequences_have_two_moments_and_a_bracket():
    rows, sequence = sample([2, 2, 2])
    grams = grams_of({"w": rows}, sequence=sequence)
    with pytest.raises(ValueError, match=r"num=4 moments and their errors need at least 5 clusters, got 3; .*num=2"):
        ff.population.moments(grams)
    assert len(ff.population.moments(grams, num=2)) == 2
    found = ff.population.leading_eigenvalue(grams)
    assert 0 < found.low <= found.high and "p2^(1/2)" in found.method
    with pytest.raises(ValueError, match="num=5"):
        ff.population.moments(grams, num=5)
    with pytest.raises(ValueError, match="1 to 6 eigenvalues"):
        ff.population.leading_sums(grams, num=7)


def test_the_bracket_holds_where_the_sample_is_one_token():
    """λ₁ of a flat population is 1; that of a sample of 80 tokens of it is three times that."""
    held = 0
    for seed in range(20):
        grams = clustered_grams([1.0] * 100, num_sequences=20, num_tokens=4, correlation=0.3, seed=seed)
        found = ff.population.leading_eigenvalue(grams)
        held += found.low <= 1 <= found.high
        out_of_sample = ff.population.leading_sums(grams, num=1)
        assert out_of_sample.in_sample[0] > 2 and out_of_sample.sums[0].low <= found.low
    assert held >= 15  # at a true coverage of 0.88 fewer than 15 of 20 come up once in a hundred times


def test_sums_lie_within_what_moments_leave():
    """λ₁ from below, and Hölder's k^(1−1/q) p_q^(1/q) from above, where these are closer than eigenvalues in sample."""
    grams = clustered_grams([1.0] * 100, num_sequences=20, num_tokens=4, correlation=0.3, seed=0)
    first, sums = ff.population.leading_eigenvalue(grams), ff.population.leading_sums(grams, num=5)
    fourth = ff.population.moments(grams)[3]
    assert first.warning is None and fourth.warning is None
    for k, found in enumerate(sums.sums, start=1):
        assert found.low >= first.low and found.high <= k**0.75 * fourth.high**0.25 * (1 + 1e-12)
        assert found.low <= k <= found.high < sum(sums.in_sample[:k])


def test_sums_survive_json():
    rows, sequence = sample()
    found = ff.population.leading_sums(grams_of({"w": rows}, sequence=sequence), num=3)
    assert LeadingSums.from_dict(json.loads(json.dumps(found.to_dict()))) == found
