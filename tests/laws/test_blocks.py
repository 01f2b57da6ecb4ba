"""Grams accumulated by block: the sums of those by parameter, N² numbers a block, and no finer block afterwards."""

from functools import cache

import pytest
import torch
from oracle import gradient_rows
from zoo import CASES, build, token_ids

import fisherfunc as ff
from fisherfunc.gradients.autodiff.nature import Nature
from fisherfunc.gradients.checks.certificate import certify
from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.pipeline import fisher

single_of = cache(lambda name: grams_of(name))
RULES = [ff.by_layer, ff.by_module, ff.by_parameter, ff.whole]


def grams_of(name, **options):
    model, batch = build(name, dtype=torch.float64)
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, batch, getattr(ff.losses, CASES[name].kind)(), **options)


def assert_same_spectra(got, expected):
    assert list(got.blocks) == list(expected.blocks)
    size = float(expected.full.eigenvalues[0])
    for label, spectrum in {**expected.blocks, "all of it": expected.full}.items():
        other = {**got.blocks, "all of it": got.full}[label]
        torch.testing.assert_close(other.eigenvalues, spectrum.eigenvalues, rtol=1e-10, atol=1e-12 * size)
        assert (other.num_params, other.exact) == (spectrum.num_params, spectrum.exact)


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["gpt2", "albert", "bart", "shared"])
def test_a_gram_a_block_is_the_sum_of_those_of_its_parameters(name, rule, route):
    single = single_of(name)
    grams = grams_of(name, blocks=rule, route=route, self_check=True)
    parts = ff.partition(single.grams, rule)
    everything = float(torch.linalg.matrix_norm(single.block()))
    assert list(grams.grams) == list(parts) == list(grams.num_params)
    for label, names in parts.items():
        torch.testing.assert_close(grams.grams[label], single.block(names), rtol=1e-11, atol=1e-12 * everything)
        assert grams.num_params[label] == sum(single.num_params[name] for name in names)
    assert grams.labels == {name: label for label, names in parts.items() for name in names}
    assert grams.metadata["accumulated"] == rule.__name__ and single.metadata["accumulated"] == "by parameter"
    assert grams.metadata["self_check"]["difference"] <= 1e-12
    for again in (rule, None):
        assert_same_spectra(
            ff.spectrum_of_grams(grams, blocks=again, center=True),
            ff.spectrum_of_grams(single, blocks=rule, center=True),
        )


def test_blocks_agree_with_the_loop():
    model, batch = build("gpt2", dtype=torch.float64)
    rows = gradient_rows(model, "causal_lm", batch)
    grams = grams_of("gpt2", blocks=ff.by_layer).grams
    for label, names in ff.partition(rows, ff.by_layer).items():
        side_by_side = torch.cat([rows[name] for name in names], dim=1)
        torch.testing.assert_close(grams[label], side_by_side @ side_by_side.T, rtol=1e-9, atol=1e-12)


def test_the_main_job_holds_a_gram_a_block(monkeypatch):
    held = []
    solve = fisher.spectrum_of_grams

    def watched(grams, **options):
        held.append(grams)
        return solve(grams, **options)

    monkeypatch.setattr("fisherfunc.pipeline.fisher.spectrum_of_grams", watched)
    model, batch = build("gpt2")
    for rule in RULES:
        result = ff.fisher_spectrum(model, batch, blocks=rule)
        assert len(held.pop().grams) == len(result.blocks) == len(ff.partition(dict(model.named_parameters()), rule))
        assert result.metadata["accumulated"] == result.metadata["blocks"] == rule.__name__


def test_blocks_that_add_up_whole_labels_are_as_good_and_others_are_an_error():
    grams, single = grams_of("gpt2", blocks=ff.by_layer), single_of("gpt2")

    def layers_or_not(name):
        return "layers" if ff.by_layer(name).startswith("layer.") else "other"

    for rule in (ff.whole, layers_or_not):
        assert_same_spectra(ff.spectrum_of_grams(grams, blocks=rule), ff.spectrum_of_grams(single, blocks=rule))
    for rule in (ff.by_parameter, ff.by_module):
        with pytest.raises(
            ValueError, match=rf"the Gram of '.*' is a sum over .* blocks of {rule.__name__}: .*pass again"
        ):
            ff.spectrum_of_grams(grams, blocks=rule)


def test_several_passes_add_up_by_block_too():
    single = grams_of("gpt2", memory_limit=10**9)
    everything = float(torch.linalg.matrix_norm(single.block()))
    passes = []
    for limit in (450_000, 520_000, 700_000):
        grams = grams_of("gpt2", blocks=ff.by_layer, memory_limit=limit)
        passes.append(grams.metadata["passes"])
        for label, names in ff.partition(single.grams, ff.by_layer).items():
            torch.testing.assert_close(grams.grams[label], single.block(names), rtol=1e-10, atol=1e-12 * everything)
    assert max(passes) > 1, passes


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_fewer_grams_need_less_memory(route):
    model, batch = build("gpt2")[0], {"input_ids": token_ids(10, 16)}
    fn = ff.functionalize(model)
    peaks = [
        ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm(), blocks=rule, route=route, chunk_size=1).metadata[
            "predicted_peak_bytes"
        ]
        for rule in (ff.by_parameter, ff.whole)
    ]
    saved = (28 - 1) * 150**2 * 8  # a Gram of 150 tokens in float64 for each tensor but one
    assert peaks[0] - peaks[1] == pytest.approx(saved, rel=0.1)


@pytest.mark.parametrize("prepare", [lambda g: g, TokenGrams.center, TokenGrams.by_sequence])
def test_a_file_keeps_the_labels(tmp_path, prepare):
    grams = prepare(grams_of("gpt2", blocks=ff.by_module))
    grams.save(tmp_path / "grams.safetensors")
    loaded = TokenGrams.load(tmp_path / "grams.safetensors")
    assert loaded.labels == grams.labels and loaded.num_params == grams.num_params
    assert all(torch.equal(loaded.grams[label], gram) for label, gram in grams.grams.items())
    got, expected = (ff.spectrum_of_grams(g, unit=g.unit) for g in (loaded, grams))
    assert_same_spectra(got, expected)


def test_a_sampled_parameter_marks_its_block_alone():
    grams = grams_of("mlp", blocks=ff.by_parameter, max_coordinates=10)
    result = ff.spectrum_of_grams(grams, blocks=ff.by_parameter)
    exact = {label: spectrum.exact for label, spectrum in result.blocks.items()}
    assert exact == {label: spectrum.num_params <= 10 for label, spectrum in result.blocks.items()}
    assert True in exact.values() and False in exact.values()
    layers = grams_of("mlp", blocks=ff.by_layer, max_coordinates=10)  # columns are drawn from the blocks as a whole
    for label, spectrum in ff.spectrum_of_grams(layers).blocks.items():
        assert spectrum.exact == (layers.num_params[label] <= 10)
    assert not ff.spectrum_of_grams(layers, blocks=ff.whole).full.exact


def test_the_self_check_names_a_block_that_is_wrong():
    model, batch = build("gpt2", dtype=torch.float64)
    grams = grams_of("gpt2", blocks=ff.by_layer)
    fn = ff.functionalize(model)
    loss, sequences, single = ff.losses.causal_lm(), split(batch), single_of("gpt2")
    work = Workload(
        fn=fn,
        params=fn.params,
        sequences=sequences,
        loss=loss,
        tokens=single.tokens,
        nature=Nature(precision=torch.float64),
    )
    assert certify(grams.grams, work, labels=grams.labels, limit=10**9).holds
    wrong = {**grams.grams, "layer.1": 1.1 * grams.grams["layer.1"]}
    found = certify(wrong, work, labels=grams.labels, limit=10**9)
    assert not found.holds and found.block == "layer.1" and 0.05 < found.difference < 0.15


def test_a_gradient_that_is_not_finite_names_the_block():
    model = torch.nn.Linear(1, 1, bias=False)
    loss = ff.losses.custom(lambda output, batch: (output * 0).sqrt().squeeze(-1), name="root")
    batch = (torch.ones(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"sequence 0, position 0 by block 'everything' is not finite"):
        fn = ff.functionalize(model)
        ff.token_grams(fn, fn.params, batch, loss, blocks=lambda _: "everything")
