"""`fisher_spectrum`: its options are the algebra they stand for, and its metadata tells the whole story."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from odd_modules import perceptron, samples
from oracle import gradient_rows
from torch.testing import assert_close
from zoo import build

import fisherfunc as ff

FEW = settings(max_examples=8)


def spectrum_of(rows):
    """eig((1/N) G Gᵀ), largest first, by NumPy's rules and no kernel of ours."""
    return torch.linalg.svdvals(rows).square() / len(rows)


def rows_of(name="gpt2"):
    model, batch = build(name, dtype=torch.float64)
    rows = gradient_rows(model, "causal_lm", batch)
    return model, batch, rows


def assert_spectrum(got, rows):
    expected = spectrum_of(rows)
    got = got.eigenvalues
    size = float(expected[0])
    torch.testing.assert_close(got, expected[: len(got)], rtol=1e-9, atol=1e-12 * size)
    assert bool((expected[len(got) :] <= 1e-20 * size + 1e-300).all()) or len(got) == min(rows.shape)


def joined(rows, names):
    return torch.cat([rows[name] for name in names], dim=1)


def test_blocks_union_and_whole_are_spectra_of_the_loops_rows():
    model, batch, rows = rows_of()
    result = ff.fisher_spectrum(model, batch)
    labels = ff.partition(rows, ff.by_layer)
    assert set(result.blocks) == set(labels) and len(labels) > 2
    for label, names in labels.items():
        assert_spectrum(result.blocks[label], joined(rows, names))
    assert_spectrum(result.full, joined(rows, rows))
    union = torch.cat([s.eigenvalues for s in result.blocks.values()]).sort(descending=True).values
    assert torch.equal(result.block_diagonal.eigenvalues, union)
    squares = sum(float(g.square().sum()) for g in rows.values()) / result.full.num_tokens
    assert float(result.full.eigenvalues.sum()) == pytest.approx(squares, rel=1e-10)
    assert float(result.block_diagonal.eigenvalues.sum()) == pytest.approx(squares, rel=1e-10)


def test_centring_is_the_covariance_of_the_rows():
    model, batch, rows = rows_of()
    g = joined(rows, rows)
    result = ff.fisher_spectrum(model, batch, center=True)
    assert_spectrum(result.full, g - g.mean(0))
    covariance = torch.linalg.eigvalsh(torch.cov(g[:, :300].T, correction=0)).flip(-1)[: len(g)]
    some = ff.spectrum_of_gradients({"some": g[:, :300]}, center=True).full.eigenvalues
    torch.testing.assert_close(some, covariance, rtol=1e-9, atol=1e-12 * float(covariance[0]))


def test_the_unit_sequence_is_the_gradient_of_the_summed_loss():
    model, batch, _ = rows_of()
    sums = []
    for b in range(3):
        one = {key: value[b : b + 1] for key, value in batch.items()}
        labels, mask = one.pop("labels"), one["attention_mask"]
        logits = model(**one).logits[0]
        loss = sum(
            torch.nn.functional.cross_entropy(logits[s], labels[0, s + 1])
            for s in range(5)
            if labels[0, s + 1] != -100 and mask[0, s] and mask[0, s + 1]
        )
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        sums.append(torch.cat([g.flatten() for g in gradients]))
    result = ff.fisher_spectrum(model, batch, unit="sequence")
    assert_spectrum(result.full, torch.stack(sums))
    assert result.full.num_tokens == result.metadata["num_tokens"] == 3 and result.metadata["unit"] == "sequence"


@FEW
@given(ff.testing.language_models())
def test_gradients_at_hand_give_the_spectra_of_the_model(drawn):
    fn = ff.functionalize(drawn.module)
    rows = ff.per_token_gradients(fn, fn.params, drawn.batch, ff.losses.causal_lm())
    at_hand = ff.spectrum_of_gradients(rows, blocks=ff.by_parameter)
    listed = [{name: g[n] for name, g in rows.items()} for n in range(len(next(iter(rows.values()))))]
    stacked = ff.spectrum_of_gradients(listed, blocks=ff.by_parameter)
    result = ff.fisher_spectrum(drawn.module, drawn.batch, loss=ff.losses.causal_lm(), blocks=ff.by_parameter)
    size = float(result.full.eigenvalues[0])
    for label, spectrum in {**result.blocks, "full": result.full}.items():
        for other in (at_hand, stacked):
            same = {**other.blocks, "full": other.full}[label]
            torch.testing.assert_close(same.eigenvalues, spectrum.eigenvalues, rtol=0, atol=1e-11 * size + 1e-300)


def test_the_partition_costs_no_second_pass_and_changes_only_the_blocks():
    model, batch = build("gpt2", dtype=torch.float64)
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm())
    for rule in (ff.by_layer, ff.by_module, ff.by_parameter, ff.whole):
        direct = ff.fisher_spectrum(model, batch, blocks=rule)
        again = ff.spectrum_of_grams(grams, blocks=rule)
        assert list(direct.blocks) == list(again.blocks)
        size = float(again.full.eigenvalues[0])
        for label, spectrum in direct.blocks.items():  # accumulated by block: the same sums in another order
            expected = again.blocks[label].eigenvalues
            torch.testing.assert_close(spectrum.eigenvalues, expected, rtol=1e-10, atol=1e-13 * size)


def test_a_model_of_one_parameter_and_one_token_has_the_spectrum_g_squared():
    model = torch.nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(3.0)
    batch = (torch.tensor([[2.0]]).double(), torch.tensor([[1.0]]).double())
    assert ff.fisher_spectrum(model, batch).full.eigenvalues.tolist() == [100.0]  # g = (3·2 − 1)·2


def test_inputs_take_the_dtype_of_the_parameters():
    model, (x, y) = perceptron(), samples()
    x = x.float()
    expected = ff.fisher_spectrum(model, (x.double(), y)).full.eigenvalues
    assert torch.equal(ff.fisher_spectrum(model, (x, y)).full.eigenvalues, expected)
    assert ff.fisher_spectrum(model, (x, y), dtype=torch.float32).metadata["dtype"] == "float32"


def test_a_plain_function_is_a_loss():
    model, batch = perceptron(), samples()

    def cross_entropy(output, one):
        return torch.nn.functional.cross_entropy(output, one[-1], reduction="none")

    got = ff.fisher_spectrum(model, batch, loss=cross_entropy)
    expected = ff.fisher_spectrum(model, batch)
    assert got.metadata["loss"] == "cross_entropy" and expected.metadata["loss"] == "classification"
    torch.testing.assert_close(got.full.eigenvalues, expected.full.eigenvalues, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_eigensolve_dtype_is_kept_and_named(dtype):
    model, batch = build("mlp", dtype=torch.float64)
    result = ff.fisher_spectrum(model, batch, eigensolve_dtype=dtype, eigensolve_device="cpu")
    assert result.full.eigenvalues.dtype == dtype
    assert result.metadata["eigensolve_dtype"] in result.metadata["solver"]["full"]


def test_a_kernel_of_a_users_own_solves_every_block_and_the_whole():
    model, batch = build("mlp", dtype=torch.float64)
    seen = []

    def own(gram):
        seen.append(gram)
        return replace(ff.kernels.gram_svd()(gram), solver="own")

    result, expected = (ff.fisher_spectrum(model, batch, kernel=kernel) for kernel in (own, None))
    assert len(seen) == len(expected.blocks) + 1 and set(result.metadata["solver"].values()) == {"own"}
    assert result.metadata["eigensolve_dtype"] is None
    for label, spectrum in (expected.blocks | {"full": expected.full}).items():
        got = (result.blocks | {"full": result.full})[label]
        assert (got.num_units, got.num_params) == (spectrum.num_units, spectrum.num_params)
        assert_close(got.eigenvalues, spectrum.eigenvalues, atol=1e-12 * float(expected.full.eigenvalues[0]), rtol=0)
        assert_close(got.resolution, spectrum.resolution, rtol=1e-6, atol=0)


def test_a_centred_kernel_is_the_option_center():
    model, batch = build("mlp", dtype=torch.float64)
    by_kernel = ff.fisher_spectrum(model, batch, kernel=ff.kernels.centred(ff.kernels.robust_eigh())).full
    by_option = ff.fisher_spectrum(model, batch, center=True).full
    assert by_kernel.solver == f"{by_option.solver} after centred"
    assert_close(by_kernel.eigenvalues, by_option.eigenvalues, atol=1e-13 * float(by_option.eigenvalues[0]), rtol=0)
    plain = ff.fisher_spectrum(model, batch).full.resolution  # from λ_max ≤ ‖ΣK‖_F, that of the kernel ≤ Σ‖K‖_F
    assert (1 - 1e-6) * plain <= by_kernel.resolution <= (1 + 1e-6) * by_option.resolution


def test_progress_counts_up_to_its_total():
    seen = []
    model, batch = build("gpt2")
    ff.fisher_spectrum(model, batch, chunk_size=2, progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0] and list(done) == sorted(set(done)) and len(done) > 2


def test_a_solver_that_fails_is_replaced_and_the_metadata_says_so(monkeypatch):
    model, batch = build("mlp", dtype=torch.float64)
    expected = ff.fisher_spectrum(model, batch)
    solve, calls = torch.linalg.eigvalsh, []

    def fails_first(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails_first)
    result = ff.fisher_spectrum(model, batch)
    first = next(iter(result.blocks))
    assert list(result.metadata["fallback"]) == [first]
    assert "did not converge" in result.metadata["fallback"][first]
    assert "did not converge" in result.to_dict()["metadata"]["fallback"][first]
    torch.testing.assert_close(result.full.eigenvalues, expected.full.eigenvalues, rtol=1e-10, atol=1e-14)


def test_metadata_tell_the_whole_story_and_survive_json():
    model, batch = build("gpt2")
    result = ff.fisher_spectrum(model, batch, num_tokens=5, seed=7, center=True)
    expected = {
        "unit": "token",
        "normalization": "F = (1/N) GᵀG, N = number of units",
        "num_tokens": 5,
        "num_params": sum(p.numel() for p in model.parameters()),
        "num_frozen_params": 0,
        "num_valid_tokens": 8,
        "num_sequences": 2,  # those that the five tokens lie in
        "dropped_tokens": 0,
        "shift": 1,
        "loss": "causal_lm",
        "fisher": "empirical",
        "targets": "observed",
        "centered": True,
        "seed": 7,
        "dtype": "float32",
        "gram_dtype": "float64",
        "eigensolve_dtype": "float64",
        "device": str(next(model.parameters()).device),
        "blocks": "by_layer",
        "fallback": {},
        "approximations": [],
        "model": "GPT2LMHeadModel",
        "mode": "evaluation",
    }
    assert {key: result.metadata[key] for key in expected} == expected
    labels = {*result.blocks, "full"}
    assert set(result.metadata["solver"]) == set(result.metadata["resolution"]) == labels
    assert all(0 < floor < math.inf for floor in result.metadata["resolution"].values())
    assert {"fisherfunc", "torch", "python"} <= set(result.metadata["versions"])
    assert result.metadata["wall_time_s"] >= result.metadata["pass_time_s"] > 0
    assert result.metadata["route"]
    plain = result.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    kept = {"metadata", "per_block", "global", "full", "sample_limits", "couplings", "intervals", "population"}
    assert set(plain) == kept
    assert set(plain["per_block"]) == set(result.blocks)


def test_a_model_without_any_gradient_has_a_spectrum_of_zeros_and_plain_metrics():
    model, batch = build("mlp", dtype=torch.float64)
    loss = ff.losses.custom(lambda output, one: 0 * output.sum(-1), name="nothing")
    result = ff.fisher_spectrum(model, batch, loss=loss)
    assert not result.full.eigenvalues.any()
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_rule_that_fails_does_so_before_the_pass():
    calls = []
    with pytest.raises(TypeError, match="3"):
        ff.fisher_spectrum(*build("mlp"), blocks=lambda _: 3, progress=lambda *done: calls.append(done))
    assert not calls


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eigensolve_device": "banana"}, ValueError, "eigensolve_device='banana' cannot be used"),
        ({"eigensolve_dtype": torch.int64}, ValueError, r"eigensolve_dtype expected torch\.float64 or torch\.float32"),
        ({"kernel": torch.linalg.eigvalsh}, TypeError, r"linalg_eigvalsh' cannot be called as kernel\(gram\)"),
        (
            {"kernel": ff.kernels.svd()},
            TypeError,
            r"cannot be called as kernel\(gram\): it takes a matrix and \['num_tok",
        ),
        ({"kernel": "eigh"}, TypeError, "kernel expected a function Gram -> Spectrum, got 'eigh'"),
        (
            {"kernel": ff.kernels.gram_eigh(), "eigensolve_dtype": torch.float32},
            ValueError,
            r"kernel= got eigensolve_device='auto' and eigensolve_dtype=torch\.float32 beside it, .*robust_eigh\(dtype",
        ),
        ({"loss": ff.losses.classification}, TypeError, r"call it: loss=ff\.losses\.classification\(\)"),
    ],
)
def test_an_unusable_option_is_found_before_the_pass(options, error, message):
    calls = []
    with pytest.raises(error, match=message):
        ff.fisher_spectrum(*build("mlp"), **options, progress=lambda *done: calls.append(done))
    assert not calls


def test_metadata_of_selected_grams_are_those_of_the_selection():
    model, batch = build("gpt2")
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm())
    facts = ff.spectrum_of_grams(grams.select([0, 1])).metadata
    assert (facts["num_tokens"], facts["num_sequences"]) == (2, 1)
    assert facts["mean_loss"] == pytest.approx(grams.tokens.loss[:2].double().mean().item())
    summed = ff.spectrum_of_grams(grams, unit="sequence").metadata
    assert (summed["num_tokens"], summed["num_summed_tokens"]) == (3, grams.num_units)
    assert summed["mean_loss"] == pytest.approx(grams.tokens.loss.double().mean().item())
    assert "transformers" in summed["versions"]


def test_a_block_that_was_kept_whole_stays_exact_beside_a_sampled_one():
    result = ff.fisher_spectrum(*build("mlp"), blocks=ff.by_parameter, max_coordinates=10)
    exact = {label: spectrum.exact for label, spectrum in result.blocks.items()}
    assert exact == {label: spectrum.num_params <= 10 for label, spectrum in result.blocks.items()}
    assert not result.full.exact


def test_the_metadata_know_the_tokens_whatever_the_model_the_loss_or_the_dtype_of_the_weights():
    model, batch = build("gpt2")
    with torch.no_grad():
        known = ff.fisher_spectrum(model, batch, blocks=ff.whole).metadata["tokens"]
        model.transformer.wte.weight.mul_(2.0)
        again = ff.fisher_spectrum(model, batch, dtype=torch.float64, loss=ff.losses.causal_lm()).metadata["tokens"]
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][0, 3] += 1
    fewer, moved = (
        ff.fisher_spectrum(model, b, num_tokens=n).metadata["tokens"] for b, n in ((batch, 4), (other, None))
    )
    assert known == again and len({known, fewer, moved}) == 3
