"""Second moments of the population: what loops over pairs of tokens of distinct sequences give, and nothing else."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from builders import grams_of
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

import fisherfunc as ff
from fisherfunc.population import BlockCoupling, BlockEstimates, Estimate, summary
from fisherfunc.testing import gradient_trees

ESTIMATORS = [getattr(ff.population, name) for name in ff.population.__all__ if name.islower()]
TREE = {"h.0.w": (7,), "h.1.w": (2, 3), "h.1.b": (2,)}
SIZES = [3, 1, 4, 2, 2]


def rows(sizes=SIZES, seed=0, tail=0.0):
    """Gradients of sequences of these sizes, dependent within each; norms as heavy-tailed as `tail` says."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    norms = torch.randn(len(sizes), generator=generator, dtype=torch.float64).mul(tail).exp()[sequence]

    def gaussian(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tree = {n: gaussian(len(sizes), *s)[sequence] + gaussian(len(sequence), *s) for n, s in TREE.items()}
    return {n: g * norms.reshape(-1, *[1] * (g.ndim - 1)) for n, g in tree.items()}, sequence


def joined(tree, names):
    return torch.cat([tree[n].reshape(len(tree[n]), -1) for n in names], dim=1).tolist()


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def squared_product(tree, sequence, left, right, without=()):
    """Σ ⟨g_a,n, g_a,m⟩⟨g_b,n, g_b,m⟩ over tokens n, m of distinct sequences, over how many there are: by loops."""
    a, b, of = joined(tree, left), joined(tree, right), sequence.tolist()
    pairs = [(n, m) for n, m in product(range(len(of)), repeat=2) if of[n] != of[m] and not {of[n], of[m]} & {*without}]
    return sum(dot(a[n], a[m]) * dot(b[n], b[m]) for n, m in pairs) / len(pairs)


def squared_trace(tree, sequence, names, without=()):
    a, of = joined(tree, names), sequence.tolist()
    pairs = [(n, m) for n, m in product(range(len(of)), repeat=2) if of[n] != of[m] and not {of[n], of[m]} & {*without}]
    return sum(dot(a[n], a[n]) * dot(a[m], a[m]) for n, m in pairs) / len(pairs)


def by_hand(value, left_out, *, log, level=0.95):
    """The interval of a jackknife as the docstrings have it, from explicit refits, by SciPy's quantiles."""
    scale, back = (torch.log, torch.exp) if log else (lambda x: x, lambda x: x)
    deviations = scale(torch.tensor(left_out, dtype=torch.float64))
    deviations = deviations - deviations.mean()
    count, total, fourth = len(left_out), (deviations**2).sum(), (deviations**4).sum()
    degrees = min(count - 1, 2 * total**2 / (fourth - total**2 / count)) / 2
    width = student.ppf((1 + level) / 2, degrees) * ((count - 1) / count * total).sqrt()
    middle = scale(torch.tensor(value, dtype=torch.float64))
    return back(middle - width).item(), back(middle + width).item()


ALL, LAYERS = tuple(TREE), {"layer.0": ("h.0.w",), "layer.1": ("h.1.w", "h.1.b")}


def test_the_squared_norm_is_that_of_a_loop_over_pairs_and_of_refits():
    tree, sequence = rows()
    found = ff.population.squared_norm(grams_of(tree, sequence=sequence)).full
    want = squared_product(tree, sequence, ALL, ALL)
    left_out = [squared_product(tree, sequence, ALL, ALL, [s]) for s in range(len(SIZES))]
    assert found.estimate == pytest.approx(want, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(by_hand(want, left_out, log=True), rel=1e-9)
    assert (found.level, found.num_clusters) == (0.95, len(SIZES))


def test_the_participation_ratio_is_the_ratio_of_two_loops_in_each_block():
    tree, sequence = rows()
    found = ff.population.participation_ratio(grams_of(tree, sequence=sequence), blocks=ff.by_layer, level=0.8)
    assert list(found) == list(LAYERS)
    for names, estimate in [*((LAYERS[label], found[label]) for label in LAYERS), (ALL, found.full)]:

        def ratio(without, names=names):
            return squared_trace(tree, sequence, names, without) / squared_product(
                tree, sequence, names, names, without
            )

        ends = by_hand(ratio([]), [ratio([s]) for s in range(len(SIZES))], log=True, level=0.8)
        size = len(joined(tree, names)[0])
        assert estimate.estimate == pytest.approx(min(ratio([]), size), rel=1e-10)
        assert (estimate.low, estimate.high) == pytest.approx([min(max(end, 1), size) for end in ends], rel=1e-8)


def test_the_block_diagonal_error_is_that_of_loops_on_the_scale_of_its_square():
    tree, sequence = rows()

    def square(without):
        own = sum(squared_product(tree, sequence, names, names, without) for names in LAYERS.values())
        return 1 - own / squared_product(tree, sequence, ALL, ALL, without)

    found = ff.population.block_diagonal_error(grams_of(tree, sequence=sequence))
    low, high = by_hand(square([]), [square([s]) for s in range(len(SIZES))], log=False)
    assert found.estimate == pytest.approx(max(square([]), 0) ** 0.5, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((max(low, 0) ** 0.5, min(high, 1) ** 0.5), rel=1e-9)


def test_couplings_are_those_of_loops():
    tree, sequence = rows()
    found = ff.population.block_coupling(grams_of(tree, sequence=sequence))
    assert found.labels == tuple(LAYERS)
    a, b = LAYERS.values()
    between, first, second = (squared_product(tree, sequence, x, y) for x, y in ((a, b), (a, a), (b, b)))
    assert found.squared_norms[0][1].estimate == pytest.approx(max(between, 0), rel=1e-10)
    assert found.squared_norms[1][1].estimate == pytest.approx(second, rel=1e-10)
    assert found.alignment[1][0].estimate == pytest.approx(max(between / (first * second) ** 0.5, 0), rel=1e-10)
    deviations = [squared_product(tree, sequence, a, b, [s]) for s in range(len(SIZES))]
    low, high = by_hand(between, deviations, log=False)
    norm = found.squared_norms[1][0]
    assert (norm.low, norm.high) == pytest.approx((max(low, 0), high), rel=1e-9)
    assert found.alignment[0][0].estimate == found.alignment[0][0].low == found.alignment[0][0].high == 1


def test_own_norms_have_intervals_of_their_logarithm_and_those_between_blocks_do_not():
    """Two blocks of one kernel: all values are positive, with and without each sequence."""
    tree, sequence = rows([3] * 12)
    found = ff.population.block_coupling(grams_of(dict.fromkeys(("h.0.w", "h.1.w"), tree["h.0.w"]), sequence=sequence))
    own, between = found.squared_norms[0]
    assert own.low * own.high == pytest.approx(own.estimate**2)
    assert between.low > 0 and between.low + between.high == pytest.approx(2 * between.estimate)


@given(gradient_trees(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_of_sequences_changes_nothing(tree, random):
    count = len(next(iter(tree.values())))
    sequence = torch.arange(count) % 4
    order = list(range(count))
    random.shuffle(order)
    renamed = torch.tensor(random.sample(range(9), 4))
    moved = grams_of({n: g[order] for n, g in tree.items()}, sequence=renamed[sequence[order]])
    if count < 3:
        with pytest.raises(ValueError, match="at least 3 sequences"):
            ff.population.squared_norm(moved)
        return
    plain = grams_of(tree, sequence=sequence)
    before, after = (ff.population.squared_norm(one).full for one in (plain, moved))
    scale = sum(float(g.double().square().sum()) for g in tree.values()) ** 2
    assert after.estimate == pytest.approx(before.estimate, rel=1e-9, abs=1e-13 * scale)


def test_estimates_are_unbiased_where_the_sample_is_far_off():
    """Of many samples the mean is that of the population within four of its standard errors; the plug-in is not."""
    eigenvalues = [4.0, 2.0, 1.0, 1.0]
    truth = sum(x**2 for x in eigenvalues)
    found, plug_in = [], []
    for seed in range(200):
        grams = ff.testing.clustered_grams(eigenvalues, num_sequences=4, num_tokens=3, correlation=0.5, seed=seed)
        found.append(ff.population.squared_norm(grams).full.estimate)
        plug_in.append(grams.block().square().sum().item() / 12**2)
    error = torch.tensor(found).std() / 200**0.5
    assert abs(sum(found) / 200 - truth) < 4 * error
    assert sum(plug_in) / 200 > truth + 8 * error


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clusters_take_the_place_of_sequences_per_sequence_or_per_row(estimator):
    tree, sequence = rows([2, 1, 3, 2, 1, 2, 2])
    documents = ["a", "b", "a", "c", "c", "d", "e"]
    numbers = torch.tensor([0, 1, 0, 2, 2, 3, 4])
    want = estimator(grams_of(tree, sequence=numbers[sequence]))
    grams = grams_of(tree, sequence=sequence)
    assert estimator(grams, clusters=documents) == want
    assert estimator(grams, clusters=numbers) == want
    assert estimator(grams, clusters=[documents[s] for s in sequence]) == want != estimator(grams)


def test_clusters_that_cannot_be_are_refused():
    tree, sequence = rows([2, 2, 2, 2])
    grams = grams_of(tree, sequence=sequence)
    with pytest.raises(ValueError, match=r"one label per sequence \(4\) or one per row \(8\), got 3"):
        ff.population.squared_norm(grams, clusters=[0, 1, 2])
    with pytest.raises(ValueError, match=r"all tokens of a sequence in one cluster.*index 1"):
        ff.population.squared_norm(grams, clusters=[0, 0, 1, 2, 2, 2, 3, 3])
    with pytest.raises(ValueError, match="needs at least 3 clusters, got 2"):
        ff.population.squared_norm(grams, clusters=[0, 0, 1, 1])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_covered_is_refused(estimator):
    tree, sequence = rows()
    grams = grams_of(tree, sequence=sequence)
    with pytest.raises(ValueError, match="uncentred"):
        estimator(grams.center())
    sampled = replace(grams, provenance=ff.Provenance(sampled_parameters=["h.0.w"]))
    with pytest.raises(ValueError, match=r"all coordinates.*h\.0\.w"):
        estimator(sampled)
    with pytest.raises(ValueError, match="unit='word'"):
        estimator(ff.TokenGrams(**{**vars(grams), "unit": "word"}))
    with pytest.raises(ValueError, match="at least 3 sequences, got 2"):
        estimator(grams.select(sequence < 2))
    with pytest.raises(ValueError, match="level"):
        estimator(grams, level=95)
    estimator(grams.by_sequence())


def test_a_zero_gram_has_no_norm_and_no_ratio():
    zeros = grams_of({"h.0.w": torch.zeros(6, 3), "h.1.w": torch.zeros(6, 2)}, sequence=torch.arange(6) % 3)
    norm, ratio = ff.population.squared_norm(zeros).full, ff.population.participation_ratio(zeros).full
    assert (norm.estimate, norm.low, norm.high) == (0, 0, 0)
    assert (ratio.estimate, ratio.low, ratio.high) == (None, 1, 5) and "no estimate" in ratio.warning
    error = ff.population.block_diagonal_error(zeros)
    assert (error.estimate, error.low, error.high) == (None, 0, 1) and "no estimate" in error.warning


def test_rank_one_has_a_participation_ratio_of_one_at_any_number_of_sequences():
    for count in (3, 4, 60):
        grams = grams_of({"w": torch.arange(1.0, count + 1)[:, None].double()})
        found = ff.population.participation_ratio(grams).full
        assert (found.estimate, found.low, found.high) == pytest.approx((1, 1, 1))


def test_orthogonal_sequences_have_no_participation_ratio():
    found = ff.population.participation_ratio(grams_of({"w": torch.eye(5, dtype=torch.float64)})).full
    assert (found.estimate, found.low, found.high) == (None, 1, 5) and found.warning


def test_sequences_of_many_lengths_are_no_heavy_tail():
    tree, sequence = rows([1, 2, 4, 8, 16, 32, 40])
    found = ff.population.squared_norm(grams_of({n: g.abs() for n, g in tree.items()}, sequence=sequence)).full
    assert found.warning is None


def test_squares_of_single_tokens_are_no_heavy_tail():
    """χ² of one degree of freedom: its logarithm spreads by 2.2, by small ones."""
    row = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert summary(grams_of({"w": row}), blocks=None).trace.full.warning is None
    lognormal = grams_of({"w": (1.1 * row).exp()})  # spreads as much
    assert "too short" in summary(lognormal, blocks=None).trace.full.warning
    # products of two clusters spread less, as the others have a part in each: the trace warns of the norm as well
    norm = summary(lognormal, blocks=None).squared_norm.full
    assert "too short" in norm.warning


def test_heavy_tails_warn_of_the_moment_and_not_of_the_ratio():
    sizes = [4] * 12
    light, heavy = (grams_of(tree, sequence=s) for tree, s in (rows(sizes, tail=0.1), rows(sizes, tail=2.5)))
    assert ff.population.squared_norm(light).full.warning is None
    assert "too short" in ff.population.squared_norm(heavy).full.warning
    assert ff.population.participation_ratio(heavy).full.warning is None


def test_one_draw_of_the_targets_is_unbiased_for_the_true_fisher():
    """Draws of distinct sequences are independent: their mean is what all classes give, within four of its errors."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    shares = torch.randn(6, 4, generator=generator, dtype=torch.float64).softmax(dim=1)
    gradients = (shares[:, None, :] - torch.eye(4))[..., None] * inputs[:, None, None, :]  # of a linear softmax
    weighted = (shares.sqrt()[:, :, None, None] * gradients).flatten(0, 1)

    def norm(rows, num_targets):
        count = len(rows) // num_targets
        grams = grams_of({"w": rows}, sequence=torch.arange(count).repeat_interleave(num_targets))
        draw = torch.arange(num_targets).repeat(count)
        tokens = ff.Tokens(**{**vars(grams.tokens), "draw": draw, "num_targets": num_targets})
        return ff.population.squared_norm(ff.TokenGrams(**{**vars(grams), "tokens": tokens})).full.estimate

    want = norm(weighted, 4)
    for num_draws in (1, 3):
        found = []
        for _ in range(200):
            drawn = torch.multinomial(shares, num_draws, replacement=True, generator=generator)
            rows = gradients[torch.arange(6)[:, None], drawn].flatten(0, 1) / num_draws**0.5
            found.append(norm(rows, num_draws))
        found = torch.tensor(found)
        assert abs(found.mean() - want) < 4 * found.std() / 200**0.5


def test_records_survive_json():
    tree, sequence = rows()
    grams = grams_of(tree, sequence=sequence)
    blocks = ff.population.squared_norm(grams)
    coupling = ff.population.block_coupling(grams)
    for record, kind in ((blocks.full, Estimate), (blocks, BlockEstimates), (coupling, BlockCoupling)):
        content = json.loads(json.dumps(record.to_dict()))
        assert kind.from_dict(content).to_dict() == record.to_dict()
