"""The unit "sequence": one row, and one backward pass, a sequence; the Grams are those of its tokens' sums."""

import json

import pytest
import torch
from odd_modules import squares
from oracle import forward, gram_errors, terms, token_loss
from zoo import CASES, build, token_ids

import fisherfunc as ff
from fisherfunc.gradients.factored import collect
from fisherfunc.gradients.rows import gradient_rows as rows_module


def grams_of(model, kind, batch, **options):
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, batch, getattr(ff.losses, kind)(), **options)


def errors(got, expected):
    """‖K − K*‖/‖K*‖ a parameter; one zero up to rounding (a key bias) is measured against the whole."""
    everything = float(torch.linalg.matrix_norm(expected.block()))
    return {
        name: float(torch.linalg.matrix_norm(got.grams[name] - k) / (torch.linalg.matrix_norm(k) + 1e-3 * everything))
        for name, k in expected.grams.items()
    }


@pytest.mark.parametrize("num_tokens", [None, 4])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_sums_of_the_tokens_that_by_sequence_adds_up(name, num_tokens):
    model, batch = build(name, dtype=torch.float64)
    options = {"num_tokens": num_tokens, "seed": 3}
    expected = grams_of(model, CASES[name].kind, batch, **options).by_sequence()
    got = grams_of(model, CASES[name].kind, batch, **options, unit="sequence", self_check=True)
    assert got.metadata["route"] == "factored" and list(got.grams) == list(expected.grams)
    assert max(errors(got, expected).values()) <= (1e-5 if CASES[name].casts else 1e-10)
    assert got.unit == expected.unit and got.num_params == expected.num_params and got.precision == expected.precision
    assert torch.equal(got.tokens.sequence, expected.tokens.sequence)
    assert torch.equal(got.tokens.position, expected.tokens.position)
    torch.testing.assert_close(got.tokens.loss, expected.tokens.loss, rtol=1e-12, atol=0)
    for key in ("num_summed_tokens", "summed_tokens", "batch", "num_valid_tokens", "dropped_tokens", "loss", "shift"):
        assert got.metadata[key] == expected.metadata[key], key
    assert not got.scale  # nothing cancelled between Grams, so their own size is that of their round-off


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "bart", "vit", "shared"])
def test_rows_are_ordinary_gradients_of_the_summed_loss(name, route):
    model, batch = build(name, dtype=torch.float64)
    kind, parameters = CASES[name].kind, dict(model.named_parameters())
    rows = {n: [] for n in parameters}
    for b in sorted({term.sequence for term in terms(kind, batch)}):
        predictions = forward(model, kind, batch, b)
        loss = sum(token_loss(kind, predictions, term) for term in terms(kind, batch) if term.sequence == b)
        for n, g in zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True):
            rows[n].append(torch.zeros_like(parameters[n]).flatten() if g is None else g.flatten())
    grams = grams_of(model, kind, batch, unit="sequence", route=route).grams
    assert max(gram_errors(grams, {n: torch.stack(r) for n, r in rows.items()}, 1e-3).values()) <= 1e-10


def passes(monkeypatch, num_sequences, route, unit):
    """The rows of cotangents that a pass pulls back."""
    model = build("lstm", dtype=torch.float64)[0]  # in float32 the round-off is measured, by passes of its own
    batch = {"input_ids": token_ids(num_sequences, 9)}
    count = 0
    with monkeypatch.context() as patch:
        if route == "dense":
            one_hot = rows_module.one_hot

            def counted(position, values):
                nonlocal count
                count += len(position)
                return one_hot(position, values)

            patch.setattr(rows_module, "one_hot", counted)
        else:
            pull = collect.pulled_back

            def counting(outputs, targets, cotangents):
                nonlocal count
                count += len(cotangents[0])
                return pull(outputs, targets, cotangents)

            patch.setattr(collect, "pulled_back", counting)
        grams_of(model, "causal_lm", batch, unit=unit, route=route, memory_limit=10**9)
    return count


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_a_further_sequence_costs_one_backward_pass_and_not_one_a_token(monkeypatch, route):
    by_unit = {
        unit: passes(monkeypatch, 7, route, unit) - passes(monkeypatch, 4, route, unit)
        for unit in ("token", "sequence")
    }
    assert by_unit["sequence"] == 3 and by_unit["token"] >= 3 * 8


def test_sequences_run_together_where_the_probe_allows_it():
    seen = []
    model = build("gpt2", dtype=torch.float64)[0]
    grams = grams_of(
        model,
        "causal_lm",
        {"input_ids": token_ids(5, 9)},
        unit="sequence",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(5, 5)] and grams.metadata["stack_width"] == 5


def test_the_spectrum_is_that_of_the_summed_tokens_and_says_so():
    model, batch = build("gpt2", dtype=torch.float64)
    fn = ff.functionalize(model)
    tokens = ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm())
    expected = ff.spectrum_of_grams(tokens, unit="sequence", center=True)
    result = ff.fisher_spectrum(model, batch, unit="sequence", center=True)
    for label, spectrum in expected.blocks.items():
        size = float(spectrum.eigenvalues[0])
        got = result.blocks[label].eigenvalues
        torch.testing.assert_close(got, spectrum.eigenvalues, rtol=1e-10, atol=1e-11 * size)
    keys = ("unit", "num_tokens", "num_sequences", "num_summed_tokens", "mean_loss", "centered")
    assert {k: result.metadata[k] for k in keys} == {k: expected.metadata[k] for k in keys}
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_token_without_a_finite_gradient_is_left_out_of_its_sequence():
    fn, batch, loss = squares()
    expected = ff.token_grams(fn, fn.params, batch, loss, drop_nonfinite=True).by_sequence()
    got = ff.token_grams(fn, fn.params, batch, loss, drop_nonfinite=True, unit="sequence")
    assert max(errors(got, expected).values()) <= 1e-12
    assert got.metadata["dropped_tokens"] == expected.metadata["dropped_tokens"] == 1
    assert got.metadata["num_summed_tokens"] == expected.metadata["num_summed_tokens"] == 5
    assert got.fingerprint == expected.fingerprint
    torch.testing.assert_close(got.tokens.loss, expected.tokens.loss)


def test_a_sequence_without_a_finite_gradient_is_an_error_that_names_it():
    fn, batch, loss = squares()
    with pytest.raises(ValueError, match=r"gradient of sequence 0 by parameter 'weight' is not finite \(1 such sequ"):
        ff.token_grams(fn, fn.params, batch, loss, unit="sequence")


def test_an_unknown_unit_is_an_error():
    fn, batch, loss = squares()
    with pytest.raises(ValueError, match="unit expected 'token' or 'sequence', got unit='batch'"):
        ff.token_grams(fn, fn.params, batch, loss, unit="batch")
