"""Coordinate subsampling: unbiased, stable, exact where it can be, and never silent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.rows.subsample import sample_coordinates

SIZES = {"a.weight": 12, "a.bias": 4, "b.weight": 30}
BLOCKS = {"a": ("a.weight", "a.bias"), "b": ("b.weight",)}


@given(st.integers(1, 40), st.integers(0, 100))
def test_a_block_keeps_k_distinct_columns_or_all_of_them(k, seed):
    chosen = sample_coordinates(SIZES, BLOCKS, max_coordinates=k, seed=seed)
    for names in BLOCKS.values():
        total = sum(SIZES[name] for name in names)
        if total <= k:
            assert not set(names) & set(chosen.index)
            continue
        assert sum(len(chosen.index[name]) for name in names) == k
        for name in names:
            index = chosen.index[name].tolist()
            assert index == sorted(set(index)) and all(0 <= i < SIZES[name] for i in index)
            assert chosen.weight[name] == pytest.approx((total / k) ** 0.5)


@given(st.integers(1, 15), st.integers(0, 100))
def test_the_choice_depends_on_label_and_seed_only(k, seed):
    chosen = sample_coordinates(SIZES, BLOCKS, max_coordinates=k, seed=seed).index
    alone = sample_coordinates(SIZES, {"b": BLOCKS["b"]}, max_coordinates=k, seed=seed).index
    shuffled = {"b": BLOCKS["b"], "a": tuple(reversed(BLOCKS["a"]))}
    reordered = sample_coordinates(dict(reversed(SIZES.items())), shuffled, max_coordinates=k, seed=seed).index
    assert torch.equal(alone["b.weight"], chosen["b.weight"])
    assert all(torch.equal(reordered[name], index) for name, index in chosen.items())


def test_the_choice_is_the_same_on_every_machine():
    chosen = sample_coordinates(SIZES, BLOCKS, max_coordinates=4, seed=1).index
    assert {name: index.tolist() for name, index in chosen.items()} == {
        "a.bias": [],
        "a.weight": [3, 8, 9, 11],
        "b.weight": [1, 24, 26, 29],
    }


def test_other_seeds_and_labels_choose_otherwise():
    def choice(label, seed):
        return tuple(
            sample_coordinates({"w": 1000}, {label: ("w",)}, max_coordinates=20, seed=seed).index["w"].tolist()
        )

    assert len({choice("x", 0), choice("x", 1), choice("y", 0)}) == 3


def test_grams_are_those_of_the_scaled_columns():
    model, batch = build("mlp", dtype=torch.float64)
    fn, loss = ff.functionalize(model), ff.losses.classification()
    grams = ff.token_grams(fn, fn.params, batch, loss, max_coordinates=5, seed=3)
    rows = ff.per_token_gradients(fn, fn.params, batch, loss)
    sizes = {name: p.numel() for name, p in fn.params.items()}
    chosen = sample_coordinates(sizes, {name: (name,) for name in sizes}, max_coordinates=5, seed=3)
    for name, g in rows.items():
        g = g.flatten(1)
        g = g[:, chosen.index[name]] * chosen.weight[name] if name in chosen.index else g
        torch.testing.assert_close(grams.grams[name], g @ g.T, rtol=1e-11, atol=1e-15)


def test_the_trace_is_unbiased_over_seeds():
    model, batch = build("mlp", dtype=torch.float64)
    exact = ff.fisher_spectrum(model, batch, blocks=ff.whole).full.eigenvalues.sum()
    traces = torch.stack(
        [
            ff.fisher_spectrum(model, batch, blocks=ff.whole, max_coordinates=12, seed=s).full.eigenvalues.sum()
            for s in range(60)
        ]
    )
    standard_error = traces.std() / 60**0.5
    assert 0 < standard_error < 0.1 * exact
    assert abs(traces.mean() - exact) < 4 * standard_error


def test_metadata_names_the_approximation_and_enough_coordinates_are_exact():
    model, batch = build("mlp", dtype=torch.float64)
    exact = ff.fisher_spectrum(model, batch)
    assert exact.metadata["approximations"] == []
    enough = ff.fisher_spectrum(model, batch, max_coordinates=1000)
    assert enough.metadata["approximations"] == []
    assert torch.equal(enough.full.eigenvalues, exact.full.eigenvalues)
    few = ff.fisher_spectrum(model, batch, max_coordinates=5, seed=2)
    assert few.metadata["approximations"][0] == "at most 5 coordinates a block, seed 2"
    assert exact.full.exact and not few.full.exact and not few.block_diagonal.exact


def test_less_than_one_coordinate_is_an_error():
    with pytest.raises(ValueError, match="max_coordinates expected at least 1, got 0"):
        sample_coordinates(SIZES, BLOCKS, max_coordinates=0)
