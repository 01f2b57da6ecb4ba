"""Against an independent library: curvlinops' empirical Fisher of the same transformer, token by token."""

import pytest
import torch
from torch import nn
from zoo import Shifted, build

import fisherfunc as ff

curvlinops = pytest.importorskip("curvlinops")


@pytest.fixture(scope="module")
def setting():
    """A GPT-2, ids, curvlinops' empirical Fisher of the mean loss over tokens, and our names for its columns."""
    model, batch = build("gpt2", dtype=torch.float64)
    model.set_attn_implementation("eager")
    ids = batch["input_ids"]
    wrapped = Shifted(model)
    names = [name.removeprefix("model.") for name, _ in wrapped.named_parameters()]
    data = [(ids[:2], ids[:2, 1:]), (ids[2:], ids[2:, 1:])]  # batches of unequal size
    parameters = list(wrapped.parameters())
    fisher = curvlinops.EFLinearOperator(
        wrapped, nn.CrossEntropyLoss(reduction="mean"), parameters, data, check_deterministic=False
    )
    return model, {"input_ids": ids}, fisher, names


def test_products_with_vectors_agree(setting):
    model, batch, fisher, names = setting
    fn = ff.functionalize(model)
    rows = ff.per_token_gradients(fn, fn.params, batch, ff.losses.causal_lm())
    g = torch.cat([rows[name].flatten(1) for name in names], dim=1)
    vectors = torch.randn(g.shape[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = g.mT @ (g @ vectors) / len(g), fisher @ vectors
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-8


def test_eigenvalues_agree(setting):
    model, batch, fisher, names = setting
    ours = ff.fisher_spectrum(model, batch).full.eigenvalues
    fn = ff.functionalize(model)
    rows = ff.per_token_gradients(fn, fn.params, batch, ff.losses.causal_lm())
    basis = torch.linalg.qr(torch.cat([rows[name].flatten(1) for name in names], dim=1).mT).Q
    compressed = basis.mT @ (fisher @ basis)  # Qᵀ F Q: their operator on the span of the gradients
    theirs = torch.linalg.eigvalsh((compressed + compressed.mT) / 2).flip(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * float(theirs[0]))
    vector = torch.randn(fisher.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outside = vector - basis @ (basis.mT @ vector)
    assert float((fisher @ outside).norm()) < 1e-10 * float(theirs[0]) * float(vector.norm())
