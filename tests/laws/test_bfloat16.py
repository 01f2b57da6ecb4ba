"""A pass in bfloat16, with Grams in float64: as near to the float32 pass as the model itself in bfloat16 is."""

import pytest
import torch

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.models.huggingface import load, text_batches

LAYERS, ROUNDINGS = 4, 22
"""On the way through a block: norm 4, projection, rotation 3, scores, softmax, mixing, projection, sum; norm 4, gate,
activation, product, projection, sum."""


def spectrum(dtype, route="factored"):
    """Of the trained model, its weights rounded to bfloat16: they are other weights, whatever the pass runs in."""
    loaded = load(assets.checkpoint("final"))
    text = assets.sample_text().read_text(encoding="utf-8")
    batches = text_batches(loaded.tokenizer, text, task=loaded.task, context=32, num_tokens=62)
    model = loaded.model.to(torch.bfloat16).to(torch.float32)
    return ff.fisher_spectrum(model, batches, num_tokens=62, dtype=dtype, route=route, self_check=True)


@pytest.fixture(scope="module")
def results():
    return {
        "float32": spectrum(torch.float32),
        "factored": spectrum(torch.bfloat16),
        "dense": spectrum(torch.bfloat16, route="dense"),
    }


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_leading_eigenvalues_and_traces_are_those_of_the_float32_pass(results, route):
    """Rows are off by ε = √(roundings) 2⁻⁹ of their norms, forward and twice as many backward, each independent.

    So ‖δG‖_F ≤ ε ‖G‖_F, and by Weyl no singular value, nor ‖G‖_F itself, is off by more: |δ√λ| ≤ ε √Σλ.
    """
    error = (3 * LAYERS * ROUNDINGS) ** 0.5 * torch.finfo(torch.bfloat16).eps / 2
    for label, exact in results["float32"].blocks.items():
        values, size = results[route].blocks[label].eigenvalues, exact.eigenvalues.sum().sqrt()
        assert float((values.sqrt() - exact.eigenvalues.sqrt()).abs().max()) <= error * size, label
        assert float((values.sum().sqrt() - size).abs()) <= error * size, label


def test_nothing_is_given_up_for_the_coarser_round_off(results):
    facts = {name: results[name].metadata for name in ("float32", "factored")}
    for key in ("route", "causal_prefixes", "output_layer"):
        assert facts["factored"][key] == facts["float32"][key], key
    assert (facts["factored"]["dtype"], facts["factored"]["gram_dtype"]) == ("bfloat16", "float64")
