"""Results side by side: right numbers, an independent formula for the alignment, and no comparison of unlike things."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import gradient_rows
from spectra import known_grams, spectrum
from spectra import random_rows as rows
from torch.testing import assert_close
from zoo import build

import fisherfunc as ff
from fisherfunc.linalg.alignment import centred_alignment
from fisherfunc.linalg.metrics import SUMMARY, summary


def known(*labels, scale=1.0, **facts):
    return spectrum(labels or ("a", "b"), scale=scale, **{"tokens": "0123", "shift": 1, **facts})


def test_every_metric_of_every_block_is_that_of_the_result_and_ratios_are_to_the_first():
    results = {"one": known("a", "b"), "two": known("b", "c", scale=3.0)}
    found = ff.compare(results)
    assert found.names == ["one", "two"] and list(found.values) == ["a", "b", "c", "block_diagonal", "full"]
    for name, result in results.items():
        whole = {"block_diagonal": result.block_diagonal, "full": result.full}
        for label, part in {**result.blocks, **whole}.items():
            expected = summary(part)
            assert {m: found.values[label][m][name] for m in SUMMARY} == {m: expected[m] for m in SUMMARY}
    assert all(row["two"] is None for row in found.values["a"].values())
    assert all(row["one"] is None and row["two"] is not None for row in found.values["c"].values())
    ratio = found.values["full"]["trace"]["two"] / found.values["full"]["trace"]["one"]
    assert found.ratios["full"]["trace"] == {"one": 1.0, "two": ratio}
    assert (
        found.ratios["a"]["trace"]
        == {"one": 1.0, "two": None}
        == found.ratios["c"]["trace"] | {"one": 1.0, "two": None}
    )


def test_a_loss_times_three_has_nine_times_the_eigenvalues():
    tree = {"a.weight": rows(0), "b.weight": rows(1)}
    results = {0: known_grams(tree), 100: known_grams({name: 3 * g for name, g in tree.items()})}
    found = ff.compare(results)
    for label in found.values:
        assert found.ratios[label]["largest"]["100"] == pytest.approx(9.0, rel=1e-12)
        assert found.ratios[label]["effective_rank"]["100"] == pytest.approx(1.0, rel=1e-12)
        assert_close(found.similarity.get(label, torch.ones(2, 2).double()), torch.ones(2, 2).double())


def test_a_zero_result_and_one_token_are_compared_as_far_as_there_is_something():
    zero = ff.compare({"zero": known(scale=0.0), "other": known()})
    assert zero.values["full"]["condition_number"]["zero"] is None
    assert set(zero.ratios["full"]["trace"].values()) == {None}
    one = {name: known_grams({"a.weight": rows(seed, 1, 1)}) for seed, name in enumerate(("x", "y"))}
    found = ff.compare(one)
    assert found.similarity["full"].isnan().all() and found.values["full"]["numerical_rank"] == {"x": 1, "y": 1}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["similarity"]["full"] == [[None, None]] * 2


DIFFERENT = {
    "tokens": ({"tokens": "4567"}, "'0123' of 'one', '4567' of 'two'", "; allowed where across names them: tokens$"),
    "fisher": (
        {"fisher": "true"},
        "'empirical' of 'one', 'true' of 'two'",
        "; allowed where across names them: fisher$",
    ),
    "loss": (
        {"loss": "masked_lm"},
        "'causal_lm, shift 1' of 'one', 'masked_lm, shift 1'",
        "; allowed where across names them: loss$",
    ),
    "centered": ({"centered": True}, "False of 'one', True of 'two'", "; allowed where across names them: centered$"),
    "blocks": ({"blocks": "by_module"}, "'by_module' of 'two'", "; allowed where across names them: blocks$"),
    "unit": ({"unit": "sequence"}, "'token' of 'one', 'sequence' of 'two'", "; unit may not differ .*with one unit"),
    "normalization": ({"normalization": "1/P"}, "'1/P' of 'two'", "; normalization may not differ"),
}


@pytest.mark.parametrize("aspect", DIFFERENT)
def test_results_that_differ_are_refused_with_what_differs_and_what_allows_it(aspect):
    facts, values, way = DIFFERENT[aspect]
    results = {"one": known(), "two": known(**facts)}
    with pytest.raises(ValueError, match=rf"cannot be compared: {aspect}: .*{values}.*{way}"):
        ff.compare(results)
    if aspect in ("unit", "normalization"):
        with pytest.raises(ValueError, match=rf"across expected some of .*got \['{aspect}'\] \('{aspect}' never"):
            ff.compare(results, across={aspect})
        return
    for other in set(DIFFERENT) - {aspect, "unit", "normalization"}:
        with pytest.raises(ValueError, match=f"cannot be compared: {aspect}"):
            ff.compare(results, across={other})
    found = ff.compare(results, across={aspect})
    assert list(found.differing) == [aspect] and list(found.differing[aspect]) == ["one", "two"]


def test_intervals_and_couplings_are_those_of_the_results():
    trees = {name: {"h.0.w": rows(seed), "h.1.w": rows(seed + 5)} for seed, name in enumerate("xy")}
    grams = {name: known_grams(tree) for name, tree in trees.items()}
    found = ff.compare(grams, intervals="jackknife")
    for name, g in grams.items():
        want = ff.statistics.jackknife(g)
        both = {**want.blocks, "block_diagonal": want.block_diagonal, "full": want.full}
        for label, metrics in both.items():
            assert {m: found.intervals[label][m][name] for m in SUMMARY} == {m: metrics[m] for m in SUMMARY}
        a, b = (matrix.mT @ matrix for matrix in (trees[name]["h.0.w"], trees[name]["h.1.w"]))
        both = torch.cat(list(trees[name].values()), dim=1)
        whole = torch.linalg.matrix_norm(both.mT @ both)
        error = math.sqrt(1 - (a.square().sum() + b.square().sum()) / whole**2)
        assert found.couplings[name].block_diagonal_error == pytest.approx(error, rel=1e-10)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["intervals"]["full"]["trace"]["y"] == found.intervals["full"]["trace"]["y"].to_dict()
    assert plain["couplings"]["x"]["block_diagonal_error"] == found.couplings["x"].block_diagonal_error
    spectra = {"x": ff.spectrum_of_grams(grams["x"], intervals="jackknife"), "y": ff.spectrum_of_grams(grams["y"])}
    some = ff.compare(spectra)
    assert some.intervals["full"]["trace"] == {"x": found.intervals["full"]["trace"]["x"], "y": None}
    assert some.to_dict()["intervals"]["full"]["trace"].keys() == {"x"}
    assert ff.compare({"x": known(), "y": known()}).couplings == {"x": None, "y": None}


def test_overlaps_are_those_of_the_leading_right_singular_vectors():
    batch = (rows(7, 6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.manual_seed(0)
    models = {name: torch.nn.Linear(4, 3).double() for name in "xyz"}
    spectra = {name: ff.fisher_spectrum(model, batch) for name, model in models.items()}
    vectors = {name: ff.fisher_eigenvectors(model, batch, num=2) for name, model in models.items()}
    found = ff.compare(spectra, vectors=vectors)
    leading = []
    for model in models.values():
        matrix = torch.cat(list(gradient_rows(model, "classification", batch).values()), dim=1)
        leading.append(torch.linalg.svd(matrix).Vh[:2])
    want = torch.stack([torch.stack([(a @ b.mT).square().sum() / 2 for b in leading]) for a in leading])
    ((label, got),) = found.overlaps.items()
    assert_close(got, want, atol=1e-8, rtol=0)
    assert (got[0, 1:] < 0.99).all() and json.loads(json.dumps(found.to_dict()))["overlaps"][label] == got.tolist()
    assert ff.compare(spectra).overlaps == {}
    other = ff.fisher_eigenvectors(models["z"], batch, num=2, blocks=ff.by_parameter, block="bias")
    for wrong in ({"x": vectors["x"]}, {**vectors, "z": other}):
        with pytest.raises(
            ValueError, match=r"vectors expected eigenvectors of one block for each of \['x', 'y', 'z'\]"
        ):
            ff.compare(spectra, vectors=wrong)


def test_all_differences_are_named_at_once():
    results = {"one": known(), "two": known(), "three": known(fisher="true", loss="mine", unit="sequence")}
    with pytest.raises(ValueError) as caught:
        ff.compare(results)
    for part in ("unit: ", "fisher: ", "loss: ", "'true' of 'three'", "across names them: fisher, loss"):
        assert part in str(caught.value)
    assert "tokens" not in str(caught.value)


def test_tokens_that_are_not_known_are_not_taken_for_the_same():
    results = {name: spectrum() for name in "ab"}
    with pytest.raises(ValueError, match="tokens: unknown of 'a', unknown of 'b'"):
        ff.compare(results)
    assert ff.compare(results, across={"tokens"}).differing == {"tokens": {"a": None, "b": None}}


BAD = {
    "none": ({}, {}, ValueError, r"at least two results of different names, got \[\]"),
    "one": ({"a": known()}, {}, ValueError, "at least two results"),
    "one name": ({1: known(), "1": known()}, {}, ValueError, "different names"),
    "an aspect": ({"a": known(), "b": known()}, {"across": {"seed"}}, ValueError, r"got \['seed'\]$"),
    "no result": ({"a": known(), "b": 3}, {}, TypeError, "result 'b' expected a FisherSpectrum or TokenGrams, got int"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_compared_is_an_error(what):
    results, options, error, message = BAD[what]
    with pytest.raises(error, match=message):
        ff.compare(results, **options)


def test_checkpoints_of_one_model_on_one_batch_compare_and_on_another_batch_do_not():
    model, batch = build("gpt2")
    fn = ff.functionalize(model)

    def grams(change=0.0, **options):
        params = {name: p + change * torch.ones_like(p) for name, p in fn.params.items()}
        return ff.token_grams(fn, params, options.pop("batch", batch), ff.losses.causal_lm(), **options)

    first, later = grams(), grams(0.1)
    found = ff.compare({"first": first, "later": later})
    assert list(found.similarity) == ["embedding", "layer.0", "layer.1", "final_norm", "full"]
    matrices = torch.stack(list(found.similarity.values()))
    assert_close(matrices.diagonal(dim1=1, dim2=2), torch.ones(5, 2).double())
    assert (matrices[:, 0, 1] < 0.9999).all() and (matrices >= 0).all()
    assert ff.compare({"first": first, "later": ff.spectrum_of_grams(later)}).similarity == {}
    other = grams(batch={**batch, "input_ids": batch["input_ids"].flip(0), "labels": batch["labels"].flip(0)})
    with pytest.raises(ValueError, match=f"cannot be compared: tokens: '{first.fingerprint}'"):
        ff.compare({"first": first, "other": other})
    assert ff.compare({"first": first, "other": other}, across={"tokens"}).similarity == {}
    with pytest.raises(ValueError, match="cannot be compared: tokens"):
        ff.compare({"first": first, "half": first.select(range(4))})
    reordered = later.select(range(later.num_units)[::-1])
    with pytest.raises(ValueError, match="'reordered' are the tokens of 'first' in another order"):
        ff.compare({"first": first, "reordered": reordered})
    spectra = {"first": ff.spectrum_of_grams(first), "reordered": ff.spectrum_of_grams(reordered)}
    assert ff.compare(spectra).values["full"]["trace"]["reordered"] == pytest.approx(later.block().trace() / 8)


def test_grams_are_compared_by_the_blocks_that_they_have_or_by_those_asked_for():
    trees = {name: {"h.0.w": rows(seed), "h.1.w": rows(seed + 5)} for seed, name in enumerate("xy")}
    grams = {name: known_grams(tree) for name, tree in trees.items()}
    labels = {"h.0.w": "h.0.w", "h.1.w": "h.1.w"}
    kept = {
        name: replace(g, labels=labels, provenance=replace(g.provenance, accumulated="mine"))
        for name, g in grams.items()
    }
    assert list(ff.compare(grams).similarity) == ["layer.0", "layer.1", "full"]
    assert list(ff.compare(grams, blocks=ff.by_parameter).similarity) == [*labels, "full"]
    found = ff.compare(kept)
    assert list(found.similarity) == [*labels, "full"]
    for label in labels:
        assert_close(found.similarity[label][0, 1], by_hand(trees["x"][label], trees["y"][label]))
    whole = [torch.cat(list(tree.values()), dim=1) for tree in trees.values()]
    assert_close(found.similarity["full"][0, 1], by_hand(*whole))


def by_hand(a, b):
    """The alignment in parameter space, ‖A_cᵀ B_c‖² / (‖A_cᵀ A_c‖ ‖B_cᵀ B_c‖): no Gram, no centring matrix."""
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    norm = torch.linalg.matrix_norm
    return norm(a.mT @ b) ** 2 / (norm(a.mT @ a) * norm(b.mT @ b))


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_the_alignment_is_that_of_the_cross_covariances(count, wide, narrow, seed):
    a, b = rows(seed, count, wide), rows(seed + 100, count, narrow) + 2.0
    got = centred_alignment(torch.stack([a @ a.mT, b @ b.mT]))
    want = by_hand(a, b)
    assert_close(
        got, torch.stack([torch.stack([want * 0 + 1, want]), torch.stack([want, want * 0 + 1])]), atol=1e-9, rtol=0
    )
    assert (got >= -1e-9).all() and (got <= 1 + 1e-9).all()


@given(st.integers(0, 99))
def test_a_rotation_a_scale_and_a_shift_of_the_gradients_change_no_alignment(seed):
    a, b = rows(seed, 7, 4), rows(seed + 100, 7, 4)
    turned = 3.0 * b @ torch.linalg.qr(rows(seed + 200, 4, 4)).Q + 5.0
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    plain, moved, permuted = (
        centred_alignment(torch.stack([x @ x.mT for x in pair])) for pair in ((a, b), (a, turned), (a[order], b[order]))
    )
    assert_close(moved, plain, atol=1e-8, rtol=0)
    assert_close(permuted, plain, atol=1e-10, rtol=0)


def test_gradients_that_are_alike_but_for_round_off_have_no_alignment():
    same = torch.full((5, 5), 0.03)
    same[0, 0] += 2e-9  # an ulp
    other = rows(0, 5, 3).float() @ rows(0, 5, 3).float().mT
    found = centred_alignment(torch.stack([same, other]))
    assert same[0, 0] > same[1, 1] and found[0].isnan().all() and found[:, 0].isnan().all()
    assert math.isclose(found[1, 1], 1.0, rel_tol=1e-6)
