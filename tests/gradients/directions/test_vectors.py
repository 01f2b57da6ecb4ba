"""Eigenvectors in parameter space against `torch.linalg.eigh` of the explicit F, whose gradients come from a loop."""

from dataclasses import replace

import pytest
import torch
from explicit import fisher_of, flat_stack, loss_for, rows_of
from torch import nn
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.directions import vectors
from fisherfunc.linalg.subspaces import orthonormalised

K = 3


def found_in(name, *, dtype=torch.float64, unit="token", center=False, batches=None, num=K, **options):
    model, batch = build(name, dtype=dtype)
    fn = ff.functionalize(model)
    batch = batch if batches is None else batches(batch)
    grams = ff.token_grams(fn, fn.params, batch, loss_for(name), unit=unit)
    grams = grams.center() if center else grams
    return ff.directions.eigenvectors(fn, fn.params, batch, loss_for(name), grams, num=num, **options)


def assert_are_eigenvectors(found, fisher, *, tolerance):
    """The same eigenvalues and, up to sign, the same vectors as a dense solver gives."""
    values, vectors = torch.linalg.eigh(fisher)
    values, vectors = values.flip(-1)[:K], vectors.flip(-1)[:, :K].mT
    torch.testing.assert_close(found.eigenvalues, values, rtol=tolerance, atol=0)
    got = flat_stack(found.vectors)
    sign = (got * vectors).sum(1, keepdim=True).sign()
    gap = (values - torch.linalg.eigvalsh(fisher).flip(-1)[1 : K + 1]).min() / values[0]
    torch.testing.assert_close(got * sign, vectors, rtol=0, atol=tolerance / gap.item())


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", ["mlp", "shared", "lstm"])
def test_they_are_those_of_the_explicit_matrix(name, center):
    model, batch = build(name, dtype=torch.float64)
    rows = rows_of(name, model, batch, center=center)
    found = found_in(name, center=center)
    assert_are_eigenvectors(found, fisher_of(rows, found.vectors), tolerance=1e-10)
    assert float(found.residuals.max()) < 1e-11
    assert found.label == "full matrix" and found.metadata["centered"] == center
    assert list(found.vectors) == list(rows)


@pytest.mark.parametrize("center", [False, True])
def test_those_of_a_block_are_of_its_diagonal_block(center):
    model, batch = build("lstm", dtype=torch.float64)
    rows = rows_of("lstm", model, batch, center=center)
    found = found_in("lstm", center=center, block="lstm", blocks=lambda name: name.split(".")[0])
    assert {name.split(".")[0] for name in found.vectors} == {"lstm"} and found.label == "lstm"
    assert_are_eigenvectors(found, fisher_of(rows, found.vectors), tolerance=1e-10)
    assert found.metadata["num_params"] == sum(rows[name].shape[1] for name in found.vectors)


@pytest.mark.parametrize("name", ["lstm", "mlp"])
def test_sequences_are_rows_too(name):
    model, batch = build(name, dtype=torch.float64)
    found = found_in(name, unit="sequence", num=2)
    fisher = fisher_of(rows_of(name, model, batch, unit="sequence"))
    v = flat_stack(found.vectors)
    torch.testing.assert_close(v @ fisher, found.eigenvalues[:, None] * v, rtol=1e-9, atol=1e-12)
    assert found.metadata["num_tokens"] == len(batch["input_ids"] if isinstance(batch, dict) else batch[0])


@pytest.mark.parametrize(("name", "dtype"), [("gpt2", torch.float64), ("gpt2", torch.float32), ("t5", torch.float32)])
def test_language_models_with_tied_weights_and_masks(name, dtype):
    """The products with the explicit F go by its rows: P is thousands here."""
    model, batch = build(name, dtype=torch.float64)
    found = found_in(name, dtype=dtype)
    rows = rows_of(name, model, batch)
    g = torch.cat([rows[n] for n in found.vectors], dim=1)
    v = flat_stack(found.vectors)
    residuals = ((v @ g.mT) @ g / len(g) - found.eigenvalues[:, None] * v).norm(dim=1) / found.eigenvalues
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert float(residuals.max()) < tolerance
    assert float((found.residuals - residuals).abs().max()) < tolerance
    torch.testing.assert_close(v @ v.mT, torch.eye(K, dtype=v.dtype), rtol=0, atol=1e-5)
    assert found.metadata["orthonormality"] < 1e-6
    for parameter, stack in found.vectors.items():
        assert stack.dtype == dtype and stack.shape == (K, *model.get_parameter(parameter).shape)


def test_float32_vectors_of_small_eigenvalues_are_orthonormal_too():
    """As many as are resolved: those of small eigenvalues lose orthonormality by rounding, and get it back."""
    model, batch = build("mlp", dtype=torch.float32)
    batch = (torch.randn(64, 4), torch.randint(3, (64,)))
    fn, loss = ff.functionalize(model), ff.losses.classification()
    grams = ff.token_grams(fn, fn.params, batch, loss)
    spectrum = ff.spectrum_of_grams(grams, blocks=ff.whole).full
    num = int(ff.metrics.numerical_rank(spectrum))
    found = ff.directions.eigenvectors(fn, fn.params, batch, loss, grams, num=num)
    v = flat_stack(found.vectors)
    assert num > 10 and found.metadata["orthonormality_before"] > found.metadata["orthonormality"]
    torch.testing.assert_close(v @ v.mT, torch.eye(num, dtype=v.dtype), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.eigenvalues, spectrum.eigenvalues[:num], rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=rf"num={num + 1} eigenvectors asked for, and {num} of"):
        ff.directions.eigenvectors(fn, fn.params, batch, loss, grams, num=num + 1)


def test_residuals_tell_of_a_wrong_vector(monkeypatch):
    def off(vectors):
        generator = torch.Generator().manual_seed(0)
        return {n: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in vectors.items()}, 0.0

    monkeypatch.setattr(vectors, "orthonormalised", off)
    model, batch = build("mlp", dtype=torch.float64)
    found = found_in("mlp", num=2)
    fisher, v = fisher_of(rows_of("mlp", model, batch)), flat_stack(found.vectors)
    expected = (v @ fisher - found.eigenvalues[:, None] * v).norm(dim=1) / found.eigenvalues
    assert float(expected.min()) > 0.1
    torch.testing.assert_close(found.residuals, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("center", [False, True])
def test_coefficients_are_the_tokens_parts(center):
    model, batch = build("lstm", dtype=torch.float64)
    found = found_in("lstm", center=center)
    rows = rows_of("lstm", model, batch, center=center)
    g = torch.cat([rows[n] for n in found.vectors], dim=1)
    along = flat_stack(found.vectors) @ g.mT
    torch.testing.assert_close(found.coefficients, along / (found.eigenvalues[:, None] * len(g)).sqrt())
    torch.testing.assert_close(found.coefficients.square().sum(1), torch.ones(K, dtype=torch.float64))
    assert bool((found.coefficients.gather(1, found.coefficients.abs().argmax(1, keepdim=True)) > 0).all())
    grams = ff.token_grams(fn := ff.functionalize(model), fn.params, batch, loss_for("lstm"))
    pairs = ff.directions.eigenpairs(grams.center() if center else grams, num=K)
    torch.testing.assert_close(pairs.coefficients, found.coefficients)
    torch.testing.assert_close(pairs.eigenvalues, found.eigenvalues)


def test_a_list_of_batches_and_chosen_tokens_in_any_order():
    model, batch = build("lstm", dtype=torch.float64)
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    fn, loss = ff.functionalize(model), loss_for("lstm")
    grams = ff.token_grams(fn, fn.params, batch, loss)
    index = torch.tensor([5, 0, 7, 3, 1])
    found = ff.directions.eigenvectors(fn, fn.params, parts, loss, grams.select(index), num=2)
    rows = {name: g[index] for name, g in rows_of("lstm", model, batch).items()}
    v, fisher = flat_stack(found.vectors), fisher_of(rows)
    torch.testing.assert_close(v @ fisher, found.eigenvalues[:, None] * v, rtol=1e-9, atol=1e-12)
    assert float(found.residuals.max()) < 1e-12 and len(found.tokens.sequence) == 5


def test_grams_by_block_give_the_vectors_of_those_blocks():
    model, batch = build("gpt2", dtype=torch.float64)
    fn, loss = ff.functionalize(model), loss_for("gpt2")
    by_tensor = ff.token_grams(fn, fn.params, batch, loss)
    by_layer = ff.token_grams(fn, fn.params, batch, loss, blocks=ff.by_layer)
    one = ff.directions.eigenvectors(fn, fn.params, batch, loss, by_tensor, block="layer.1")
    other = ff.directions.eigenvectors(fn, fn.params, batch, loss, by_layer, block="layer.1")
    assert list(one.vectors) == list(other.vectors) == [n for n in fn.params if n.startswith("transformer.h.1.")]
    torch.testing.assert_close(flat_stack(one.vectors), flat_stack(other.vectors))
    with pytest.raises(ValueError, match=r"no block 'layer.7'; the blocks are \['embedding', 'layer.0', 'layer.1'"):
        ff.directions.eigenvectors(fn, fn.params, batch, loss, by_layer, block="layer.7")
    with pytest.raises(ValueError, match=r"are also of \['transformer.h.0"):
        ff.directions.eigenpairs(by_layer, block="transformer.h.0.ln_1.weight", blocks=ff.by_parameter)


def test_one_token_has_its_own_gradient_as_the_only_direction():
    model, batch = (
        nn.Linear(1, 1, bias=False).double(),
        (torch.tensor([[2.0]]).double(), torch.tensor([[1.0]]).double()),
    )
    fn, loss = ff.functionalize(model), ff.losses.regression()
    params = {"weight": torch.tensor([[3.0]], dtype=torch.float64)}
    grams = ff.token_grams(fn, params, batch, loss)  # N = 1, P = 1: the gradient is 2 (2·3 − 1) = 10
    found = ff.directions.eigenvectors(fn, params, batch, loss, grams)
    assert found.eigenvalues.tolist() == pytest.approx([100.0])
    assert found.vectors["weight"].flatten().tolist() == pytest.approx([1.0])
    assert found.coefficients.tolist() == [[1.0]] and found.residuals.tolist() == pytest.approx([0.0], abs=1e-15)
    with pytest.raises(ValueError, match="0 of 1 eigenvalues are above the resolution"):
        ff.directions.eigenvectors(fn, params, batch, loss, grams.center())


def test_vectors_that_are_far_from_orthonormal_are_refused():
    with pytest.raises(ValueError, match="depart from orthonormality by 1"):
        orthonormalised({"w": torch.ones(2, 1)})


def mismatches():
    """What is not what the Grams are of, and what the error says."""
    model, batch = build("lstm", dtype=torch.float64)
    fn, loss = ff.functionalize(model), loss_for("lstm")
    moved = {name: p + 0.1 for name, p in fn.params.items()}
    other = {**batch, "input_ids": (batch["input_ids"] + 1) % 37, "labels": batch["labels"]}
    shorter = {key: value[:1] for key, value in batch.items()}
    masked = ff.losses.masked_lm()
    return {
        "params": ((fn, moved, batch, loss), {}, r"the loss of sequence 0, position 0 is .* in the Grams"),
        "batch": ((fn, fn.params, other, loss), {}, r"the loss of sequence 0, position 0 is"),
        "tokens": ((fn, fn.params, shorter, loss), {}, "a row for sequence 1, position 0, where this batch has no"),
        "loss": ((fn, fn.params, batch, masked), {}, "of the loss 'causal_lm', got loss 'masked_lm'"),
        "num": ((fn, fn.params, batch, loss), {"num": 0}, "num expected at least 1, got num=0"),
    }


@pytest.mark.parametrize("case", ["params", "batch", "tokens", "loss", "num"])
def test_what_the_grams_are_not_of_is_an_error(case):
    model, batch = build("lstm", dtype=torch.float64)
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, batch, loss_for("lstm"))
    arguments, options, message = mismatches()[case]
    with pytest.raises(ValueError, match=message):
        ff.directions.eigenvectors(*arguments, grams, **options)


def test_grams_that_are_no_plain_gradients_are_refused():
    model, batch = build("mlp", dtype=torch.float64)
    fn, loss = ff.functionalize(model), loss_for("mlp")
    sampled = ff.token_grams(fn, fn.params, batch, loss, max_coordinates=5)
    with pytest.raises(ValueError, match="a sample of the coordinates of"):
        ff.directions.eigenvectors(fn, fn.params, batch, loss, sampled)
    whole = ff.token_grams(fn, fn.params, batch, loss)
    part = ff.token_grams(fn, {"0.weight": fn.params["0.weight"]}, batch, loss)
    with pytest.raises(ValueError, match=r"no Gram for \['0.bias', '2.weight'"):
        ff.directions.eigenvectors(fn, fn.params, batch, loss, part)
    drawn = replace(whole, provenance=replace(whole.provenance, targets="sampled"))
    with pytest.raises(ValueError, match="targets='sampled'"):
        ff.directions.eigenvectors(fn, fn.params, batch, loss, drawn)


def test_sums_over_chosen_tokens_are_found_again_or_refused():
    model, batch = build("lstm", dtype=torch.float64)
    fn, loss = ff.functionalize(model), loss_for("lstm")
    grams = ff.token_grams(fn, fn.params, batch, loss, unit="sequence", num_tokens=5, seed=3)
    found = ff.directions.eigenvectors(fn, fn.params, batch, loss, grams)
    assert float(found.residuals.max()) < 1e-12
    chosen = ff.token_grams(fn, fn.params, batch, loss).select([0, 1, 2]).by_sequence()
    with pytest.raises(ValueError, match="keep the Grams of the tokens"):
        ff.directions.eigenvectors(fn, fn.params, batch, loss, chosen)


def test_the_module_stays_as_it_was():
    model, batch = build("lstm", dtype=torch.float32)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    fn, loss = ff.functionalize(model), loss_for("lstm")
    grams = ff.token_grams(fn, fn.params, batch, loss)
    found = [ff.directions.eigenvectors(fn, fn.params, batch, loss, grams)]
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found.append(ff.directions.eigenvectors(fn, fn.params, batch, loss, grams))
    assert all(torch.equal(flat_stack(other.vectors), flat_stack(found[0].vectors)) for other in found)
    assert all(torch.equal(other.residuals, found[0].residuals) for other in found)
    assert model.training and flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_of_a_module_and_a_batch_at_once():
    model, batch = build("lstm", dtype=torch.float32)
    options = {"block": "lstm", "blocks": lambda name: name.split(".")[0]}
    loss = loss_for("lstm")
    found = ff.fisher_eigenvectors(
        model, batch, num=2, loss=loss, dtype=torch.float64, center=True, num_tokens=7, **options
    )
    fn = ff.functionalize(model).to(dtype=torch.float64)
    grams = ff.token_grams(fn, fn.params, batch, loss, num_tokens=7).center()
    expected = ff.directions.eigenvectors(fn, fn.params, batch, loss, grams, num=2, **options)
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues)
    torch.testing.assert_close(flat_stack(found.vectors), flat_stack(expected.vectors))
    assert found.label == "lstm" and list(found.vectors) == list(expected.vectors)
    with pytest.raises(ValueError, match="no block 'attention'"):
        ff.fisher_eigenvectors(model, batch, block="attention", loss=loss)


def test_what_exists_beyond_the_sample_is_that_of_explicit_refits():
    """λ_out,k: of each sequence, its rows along the k-th eigenvector of all others; none where nothing can be said."""
    found, rows = found_in("lstm"), torch.cat([*rows_of("lstm", *build("lstm", dtype=torch.float64)).values()], dim=1)
    sequence, want = found.tokens.sequence, torch.zeros(K, dtype=torch.float64)
    for s in sequence.unique():
        _, vectors = torch.linalg.eigh(rows[sequence != s].mT @ rows[sequence != s])
        want += (rows[sequence == s] @ vectors.flip(1)[:, :K]).square().sum(dim=0) / len(rows)
    # Ritz values that moved by less than 1e-7 λ₁ are of vectors that are off by the root of that, by the gap
    torch.testing.assert_close(found.out_of_sample, want, rtol=0, atol=1e-3 * float(found.eigenvalues[0]))
    torch.testing.assert_close(found.beyond_sample, found.out_of_sample / found.eigenvalues, rtol=0, atol=0)
    assert found_in("lstm", center=True).out_of_sample is None
