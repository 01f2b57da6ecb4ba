"""Couplings and halves: what the Grams give is what the gradients themselves give."""

import json
import math

import pytest
import torch
from builders import grams_of, matrices
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import fisherfunc as ff
from fisherfunc.partitioning import by_parameter, whole
from fisherfunc.statistics import BlockCoupling, block_coupling, block_diagonal_error, split_halves
from fisherfunc.statistics import coupling as module
from fisherfunc.testing import gradient_trees, partitions

trees_with_rules = gradient_trees().flatmap(lambda tree: st.tuples(st.just(tree), partitions(tree)))


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fisher_blocks(tree, rule, *, center):
    """{label: {label: F_ab}}, formed."""
    rows = {name: g - g.mean(dim=0) if center else g for name, g in matrices(tree).items()}
    joined = {label: torch.cat([rows[n] for n in names], dim=1) for label, names in ff.partition(rows, rule).items()}
    return {a: {b: x.mT @ y / len(x) for b, y in joined.items()} for a, x in joined.items()}


@given(trees_with_rules, st.booleans())
def test_couplings_are_the_norms_of_the_blocks_of_f(tree_and_rule, center):
    tree, rule = tree_and_rule
    found, blocks = block_coupling(grams_of(tree), blocks=rule, center=center), fisher_blocks(tree, rule, center=center)
    want = torch.tensor([[block.square().sum().item() for block in row.values()] for row in blocks.values()])
    scale = sum(float(g.square().sum()) for g in tree.values()) ** 2
    assert found.labels == tuple(blocks) and found.centered == center
    assert_close(torch.tensor(found.squared_norms, dtype=want.dtype), want, atol=1e-12 * scale, rtol=1e-6)


@given(trees_with_rules)
def test_the_error_of_the_block_diagonal_matrix_is_that_of_the_matrices(tree_and_rule):
    tree, rule = tree_and_rule
    blocks = fisher_blocks(tree, rule, center=False)
    full = torch.cat([torch.cat(list(row.values()), dim=1) for row in blocks.values()])
    diagonal = torch.block_diag(*(row[label] for label, row in blocks.items()))
    norm = torch.linalg.matrix_norm(full).item()
    want = torch.linalg.matrix_norm(full - diagonal).item() / norm if norm > 0 else 0.0
    assert block_diagonal_error(grams_of(tree), blocks=rule) == pytest.approx(want, rel=1e-9, abs=1e-12)


@given(gradient_trees())
def test_alignments_are_between_zero_and_one_and_symmetric(tree):
    alignment = torch.tensor(block_coupling(grams_of(tree), blocks=by_parameter).alignment)
    assert bool((alignment >= 0).all()) and bool((alignment <= 1 + 1e-6).all())
    assert_close(alignment, alignment.mT, atol=1e-6, rtol=0)


def test_the_alignment_has_its_closed_forms():
    rows = gaussian(6, 3)
    rotation = torch.linalg.qr(gaussian(3, 3, seed=1)).Q
    same = {"a": rows, "b": 5 * rows @ rotation}  # one kernel, up to scale
    assert_close(torch.tensor(block_coupling(grams_of(same), blocks=by_parameter).alignment), torch.ones(2, 2))
    apart = {"a": torch.eye(4)[:, :2], "b": torch.eye(4)[:, 2:]}  # no row has both
    assert_close(torch.tensor(block_coupling(grams_of(apart), blocks=by_parameter).alignment), torch.eye(2))
    assert block_diagonal_error(grams_of(apart), blocks=by_parameter) == 0
    zero = {"a": rows, "b": torch.zeros(6, 2)}
    assert block_coupling(grams_of(zero), blocks=by_parameter).alignment[1] == (0.0, 0.0)
    assert block_diagonal_error(grams_of({"w": torch.zeros(2, 2)})) == 0
    assert block_diagonal_error(grams_of(same), blocks=whole) == 0


def test_centred_it_is_the_linear_cka():
    x, y = gaussian(9, 4), gaussian(9, 6, seed=1)
    x, y = x + 3, y - 2 * x[:, :1]
    cx, cy = x - x.mean(dim=0), y - y.mean(dim=0)
    norm = torch.linalg.matrix_norm
    want = (norm(cy.mT @ cx) ** 2 / norm(cx.mT @ cx) / norm(cy.mT @ cy)).item()  # Kornblith et al. 2019, equation 6
    grams = grams_of({"x": x, "y": y})
    for found in (
        block_coupling(grams, blocks=by_parameter, center=True),
        block_coupling(grams.center(), blocks=by_parameter),
    ):
        assert found.centered and found.alignment[0][1] == pytest.approx(want, rel=1e-9)
    assert block_coupling(grams, blocks=by_parameter).alignment[0][1] != pytest.approx(want, rel=1e-3)


def test_the_tiles_change_nothing_and_the_record_is_plain(monkeypatch):
    grams = grams_of({"a": gaussian(7, 4), "b": gaussian(7, 6, seed=1), "c": gaussian(7, 1, seed=2)})
    whole_ = block_coupling(grams, blocks=by_parameter)
    monkeypatch.setattr(module, "TILE", 3)
    tiled = block_coupling(grams, blocks=by_parameter)
    assert_close(torch.tensor(tiled.squared_norms), torch.tensor(whole_.squared_norms))
    plain = json.loads(json.dumps(whole_.to_dict(), allow_nan=False))
    assert plain == whole_.to_dict() and BlockCoupling.from_dict(plain) == whole_


def leading(rows, k):
    return torch.linalg.svd(rows, full_matrices=False).Vh[:k].mT


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("num_leading", [1, 3])
def test_halves_are_disjoint_and_their_overlap_that_of_the_eigenvectors(center, num_leading):
    tree = {"a": gaussian(24, 30), "b": gaussian(24, 4, seed=1)}
    tree["a"][:, 0] *= 5
    sequence = torch.arange(24) % 5
    grams = grams_of(tree, sequence=sequence)
    options = {"blocks": by_parameter, "num_leading": num_leading, "seed": 1}
    found = split_halves(grams.center() if center else grams, num_splits=1, **options)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    first = torch.isin(sequence, order[:2])
    for got, rows in [
        (found.blocks["a"], tree["a"]),
        (found.blocks["b"], tree["b"]),
        (found.full, torch.cat(list(tree.values()), dim=1)),
    ]:
        halves = [rows[first], rows[~first]]
        halves = [half - half.mean(dim=0) for half in halves] if center else halves
        for spectrum, half in zip((got.first, got.second), halves, strict=True):
            want = torch.linalg.svdvals(half).square() / len(half)
            count = min(len(want), len(spectrum.eigenvalues))
            assert_close(spectrum.eigenvalues[:count], want[:count], atol=1e-11, rtol=0)
            assert spectrum.num_tokens == len(half)
        overlap = (leading(halves[0], num_leading).mT @ leading(halves[1], num_leading)).square().sum() / num_leading
        assert_close(got.overlap, overlap, atol=1e-9, rtol=0)
        assert got.num_leading == num_leading and got.spread.isnan()
        if center:
            assert math.isnan(got.chance)
            continue
        pairs = [(n, m) for n in range(24) for m in range(24) if n % 5 != m % 5]
        squares = rows.square().sum(dim=1)
        ratio = sum(squares[n] * squares[m] for n, m in pairs) / sum((rows[n] @ rows[m]) ** 2 for n, m in pairs)
        assert got.chance == pytest.approx(num_leading / float(ratio), rel=1e-9)


def test_directions_that_are_tokens_overlap_by_chance_and_splits_say_how_much_that_varies():
    """Of a flat population each leading direction is noise: within four errors of the mean over independent samples."""
    off = []
    for seed in range(20):
        got = split_halves(grams_of({"w": gaussian(16, 400, seed=seed)}), num_leading=3, num_splits=4).full
        assert got.overlaps.shape == (4,) and float(got.spread) > 0
        off.append(got.overlap.item() - got.chance)
    off = torch.tensor(off)
    assert abs(off.mean()) < 4 * off.std() / 20**0.5


def test_the_overlap_of_the_same_and_of_orthogonal_directions():
    direction = gaussian(1, 9)
    one = split_halves(grams_of({"w": gaussian(8, 1) * direction}), num_leading=4)
    assert one.full.num_leading == 1 and one.full.overlap.item() == pytest.approx(1, abs=1e-12)
    apart = split_halves(grams_of({"w": torch.eye(4)}), num_leading=1)
    assert apart.full.overlap.item() == 0
    nothing = split_halves(grams_of({"w": torch.zeros(4, 2)}))
    assert nothing.full.num_leading == 0 and nothing.full.overlap.isnan()


def test_the_seed_picks_the_halves():
    grams = grams_of({"w": gaussian(12, 5)})
    overlaps = {split_halves(grams, num_leading=2, seed=seed).full.overlap.item() for seed in (0, 0, 1)}
    assert len(overlaps) == 2


def test_halves_need_two_sequences_and_a_direction():
    grams = grams_of({"w": gaussian(4, 2)}, sequence=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 2 sequences, got 1"):
        split_halves(grams)
    with pytest.raises(ValueError, match="num_leading=0"):
        split_halves(grams_of({"w": gaussian(4, 2)}), num_leading=0)
