"""From Grams or gradients at hand to spectra: the laws of blocks, units and centring, closed forms, errors."""

import json
import math

import pytest
import torch
from builders import grams_of, matrices, total_square
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fisherfunc.linalg import kernels, metrics
from fisherfunc.linalg.union import union
from fisherfunc.partitioning import by_parameter, whole
from fisherfunc.pipeline.solve import spectrum_of_gradients, spectrum_of_grams
from fisherfunc.surface.files import to_csv
from fisherfunc.testing import gradient_trees, partitions


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_results_equal(got, want, *, tolerance):
    assert list(got.blocks) == list(want.blocks)
    pairs = [(got.blocks[label], want.blocks[label]) for label in want.blocks]
    for ours, theirs in [*pairs, (got.full, want.full), (got.block_diagonal, want.block_diagonal)]:
        assert_close(ours.eigenvalues, theirs.eigenvalues, atol=tolerance, rtol=0)
        assert (ours.num_tokens, ours.num_params) == (theirs.num_tokens, theirs.num_params)


trees_with_rules = gradient_trees().flatmap(lambda tree: st.tuples(st.just(tree), partitions(tree)))


@given(trees_with_rules, st.booleans())
def test_grams_and_gradients_give_the_same(tree_and_rule, center):
    tree, rule = tree_and_rule
    from_grams = spectrum_of_grams(grams_of(tree), blocks=rule, center=center)
    from_rows = spectrum_of_gradients(tree, blocks=rule, center=center)
    # Not to round-off of one entry: in a centred float64 tree all that is left may be round-off.
    assert_results_equal(from_grams, from_rows, tolerance=1e-13 * total_square(tree))


@given(trees_with_rules)
def test_block_traces_sum_to_that_of_the_full_matrix(tree_and_rule):
    tree, rule = tree_and_rule
    result = spectrum_of_gradients(tree, blocks=rule)
    total = total_square(tree) / result.full.num_tokens
    traces = [metrics.trace(spectrum).item() for spectrum in result.blocks.values()]
    assert sum(traces) == pytest.approx(total, rel=1e-12)
    assert metrics.trace(result.full).item() == pytest.approx(total, rel=1e-12)
    assert metrics.trace(result.block_diagonal).item() == pytest.approx(total, rel=1e-12)


@given(trees_with_rules)
def test_each_block_is_its_rows_and_the_full_matrix_all_rows(tree_and_rule):
    tree, rule = tree_and_rule
    result = spectrum_of_grams(grams_of(tree), blocks=rule)
    tolerance = 1e-13 * total_square(tree)
    for label, spectrum in [*result.blocks.items(), (None, result.full)]:
        names = [name for name in tree if label in (None, rule(name))]
        rows = torch.cat([matrices(tree)[name] for name in names], dim=1)
        want = torch.linalg.svdvals(rows).square() / len(rows)
        assert_close(spectrum.eigenvalues, want, atol=tolerance, rtol=0)
        assert spectrum.num_params == rows.shape[1]


@given(trees_with_rules)
def test_the_union_is_the_sorted_concatenation_of_the_blocks(tree_and_rule):
    tree, rule = tree_and_rule
    result = spectrum_of_gradients(tree, blocks=rule)
    values = [v for spectrum in result.blocks.values() for v in spectrum.eigenvalues.tolist()]
    assert result.block_diagonal.eigenvalues.tolist() == sorted(values, reverse=True)
    assert result.block_diagonal.num_params == sum(s.num_params for s in result.blocks.values())
    assert result.block_diagonal.resolution == max(s.resolution for s in result.blocks.values())


def test_a_union_carries_the_worst_of_its_blocks(monkeypatch):
    sketched = kernels.svd_lowrank(rank=1, oversampling=0)(gaussian(4, 5))
    original, calls = torch.linalg.eigvalsh, iter([True])
    forced = torch.linalg.LinAlgError("forced")

    def failing_once(matrix):
        if next(calls, False):
            raise forced
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", failing_once)
    rescued = kernels.robust_eigh()(gaussian(4, 4) @ gaussian(4, 4).mT)
    both = union({"a": rescued, "b": sketched})
    assert not both.exact and both.fallback == "a: _LinAlgError: forced" and both.num_params is None
    assert both.negative_part == min(rescued.negative_part, sketched.negative_part)


@given(gradient_trees())
def test_one_block_and_the_finest_partition_have_the_same_full_matrix(tree):
    coarse, fine = (spectrum_of_gradients(tree, blocks=rule) for rule in (whole, by_parameter))
    assert torch.equal(coarse.full.eigenvalues, fine.full.eigenvalues)
    assert torch.equal(coarse.block_diagonal.eigenvalues, coarse.full.eigenvalues)
    assert list(fine.blocks) == list(tree)


@given(gradient_trees())
def test_a_dict_and_a_list_of_dicts_are_the_same(tree):
    samples = [{name: g[n] for name, g in tree.items()} for n in range(len(next(iter(tree.values()))))]
    stacked, listed = spectrum_of_gradients(tree), spectrum_of_gradients(samples)
    assert torch.equal(stacked.full.eigenvalues, listed.full.eigenvalues)
    assert listed.to_dict() == stacked.to_dict()


@given(gradient_trees(), st.data())
def test_the_unit_sequence_sums_its_tokens(tree, data):
    num_rows = len(next(iter(tree.values())))
    sequence = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=num_rows, max_size=num_rows)))
    sums = {name: torch.stack([g[sequence == s].sum(dim=0) for s in sequence.unique()]) for name, g in tree.items()}
    got = spectrum_of_grams(grams_of(tree, sequence=sequence), unit="sequence")
    want = spectrum_of_gradients(sums).full.eigenvalues
    assert_close(got.full.eigenvalues, want, atol=1e-12 * total_square(tree), rtol=0)
    assert got.metadata["unit"] == "sequence" and got.metadata["num_tokens"] == len(sequence.unique())


def test_the_unit_is_checked():
    grams = grams_of({"w": gaussian(3, 2)})
    with pytest.raises(ValueError, match="unit='word'"):
        spectrum_of_grams(grams, unit="word")
    with pytest.raises(ValueError, match="cannot be had from Grams of unit 'sequence'"):
        spectrum_of_grams(grams.by_sequence())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 30), (30, 6)])
def test_nearly_identical_rows_centred_are_numerically_zero_on_both_routes(dtype, shape):
    rows = (1e3 * gaussian(1, shape[1]) + torch.zeros(shape)).to(dtype)
    rows = rows * (1 + torch.finfo(dtype).eps * gaussian(*shape).sign().to(dtype))
    tree = {"w": rows, "b": rows[:, :2]}
    from_grams, from_rows = spectrum_of_grams(grams_of(tree), center=True), spectrum_of_gradients(tree, center=True)
    for result in (from_grams, from_rows):
        for spectrum in [*result.blocks.values(), result.full]:
            assert metrics.numerical_rank(spectrum).item() == 0
    assert_results_equal(from_grams, from_rows, tolerance=float(from_grams.full.resolution))


def test_centring_leaves_what_is_above_the_floor():
    shift = 1e3 * gaussian(1, 30)
    result = spectrum_of_gradients({"w": gaussian(6, 30, seed=1) + shift}, center=True)
    assert metrics.numerical_rank(result.full).item() == 5


def test_gaussian_rows_lie_within_the_marchenko_pastur_edges():
    num_rows, num_params = 200, 400
    result = spectrum_of_gradients({"w": gaussian(num_rows, num_params)})
    ratio = num_params / num_rows
    edges = [(1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2]
    # The edges are those of N → ∞; at N = 200 eigenvalues there scatter by about N^(-2/3) = 3 % of the width.
    slack = 0.01 * (edges[1] - edges[0])
    assert metrics.smallest(result.full).item() == pytest.approx(edges[0], abs=slack)
    assert metrics.largest(result.full).item() == pytest.approx(edges[1], abs=4 * slack)
    assert metrics.trace(result.full).item() == pytest.approx(num_params, rel=0.02)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_parallel_gradients_have_one_eigenvalue_their_mean_square_norm(num_rows, num_params, seed):
    rows = gaussian(num_rows, 1, seed=seed) * gaussian(1, num_params, seed=seed + 1)
    result = spectrum_of_gradients({"w": rows})
    assert metrics.largest(result.full).item() == pytest.approx(rows.square().sum().item() / num_rows, rel=1e-12)
    assert metrics.numerical_rank(result.full).item() == 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 3))
def test_orthogonal_gradients_have_their_square_norms_over_n_as_eigenvalues(norms, extra):
    rows = torch.diag(torch.tensor(norms, dtype=torch.float64))
    result = spectrum_of_gradients({"w": torch.cat([rows, torch.zeros(len(norms), extra)], dim=1)})
    want = torch.tensor(sorted((norm**2 / len(norms) for norm in norms), reverse=True), dtype=torch.float64)
    assert_close(result.full.eigenvalues, want, atol=0, rtol=1e-9)


@given(gradient_trees(dtype=torch.float32), st.booleans())
def test_a_result_round_trips_through_json(tree, center):
    plain = spectrum_of_gradients(tree, center=center).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    kept = {"metadata", "per_block", "global", "full", "sample_limits", "couplings", "intervals", "population"}
    assert set(plain) == kept


def test_zero_gradients_make_a_result_without_nan():
    plain = spectrum_of_gradients({"w": torch.zeros(3, 2), "b": torch.zeros(3)}).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["full"]["effective_rank"] == 0 and plain["global"]["condition_number"] is None


def test_the_metadata_say_what_was_computed():
    tree = {"layers.0.w": gaussian(3, 2, 2), "head.w": gaussian(3, 5)}
    lowrank = kernels.svd_lowrank(rank=1, oversampling=0)
    facts = spectrum_of_gradients(tree, center=True, kernel=lowrank).metadata
    assert (facts["num_tokens"], facts["num_params"], facts["dtype"]) == (3, 9, "float64")
    assert facts["centered"] and facts["blocks"] == "by_layer" and "1/N" in facts["normalization"]
    assert set(facts["solver"]) == set(facts["resolution"]) == {"layer.0", "output", "full"}
    assert [entry.split(":")[0] for entry in facts["approximations"]] == ["layer.0", "output", "full"]
    exact = spectrum_of_grams(grams_of(tree)).metadata
    assert exact["approximations"] == [] and exact["fallback"] == {}
    assert exact["loss"] == "causal_lm" and not exact["centered"]


def test_a_gram_that_is_not_one_is_an_error():
    grams = grams_of({"w": gaussian(3, 4)})
    grams.grams["w"].sub_(torch.eye(3))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        spectrum_of_grams(grams)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({}, "at least one parameter"),
        ([], "at least one sample"),
        ([{}], "at least one parameter"),
        ({"w": torch.zeros(0, 2)}, r"one N >= 1 for all, got N=\{'w': 0\}"),
        ({"w": torch.tensor(1.0)}, r"got N=\{'w': None\}"),
        ({"w": torch.zeros(3, 2), "b": torch.zeros(2)}, r"got N=\{'w': 3, 'b': 2\}"),
        ({"w": torch.zeros(3, 2, dtype=torch.long)}, "'w' expected a floating-point dtype, got torch.int64"),
        ({"w": torch.tensor([[0.0, 0.0], [0.0, math.nan]])}, "'w' is not finite in row 1"),
        ({"w": torch.tensor([0.0, math.inf])}, "'w' is not finite in row 1"),
        ([{"w": torch.zeros(2)}, {"b": torch.zeros(2)}], r"sample 1 has .* than sample 0: \['b', 'w'\]"),
        ([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}], r"sample 1 has .* than sample 0: \['w'\]"),
    ],
)
def test_gradients_that_are_none_are_errors_that_name_the_place(gradients, message):
    with pytest.raises(ValueError, match=message):
        spectrum_of_gradients(gradients)


@pytest.mark.parametrize("label", ["full", "block_diagonal"])
def test_a_block_may_be_called_what_the_whole_matrix_is(label):
    gradients = {"a": torch.ones(2, 1), "b": torch.tensor([[1.0], [3.0]])}
    result = spectrum_of_gradients(gradients, blocks=lambda name: label if name == "a" else "rest")
    assert result.blocks[label].eigenvalues.tolist() == [1.0]
    assert {label, "rest", "(full)" if label == "full" else "full"} == set(result.metadata["solver"])
    rows = [line.split(",")[0] for line in to_csv(result).splitlines()[1:]]
    assert len(set(rows)) == 4


@pytest.mark.parametrize("size", [1e-170, 1e-150])
def test_gradients_whose_squares_vanish_are_an_error_and_zeros_are_not(size):
    tree = {"w": size * gaussian(4, 3), "b": torch.zeros(4, 2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"largest entry is \d\.\de-1[57]\d, that their squares vanish"):
        spectrum_of_gradients(tree)
    assert metrics.trace(spectrum_of_gradients({"w": torch.zeros(4, 3)}).full).item() == 0
    large = {"w": gaussian(4, 3), "b": size * gaussian(4, 2)}  # beside others they are as good as zero
    assert metrics.trace(spectrum_of_gradients(large).full).item() > 0
