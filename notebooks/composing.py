# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Composing: Grams, kernels, combinators
#
# `ff.fisher_spectrum(model, batch)` does all of this in one call. What are the parts, and what can be had from one expensive pass by
# putting them together in other ways? One pass gives the Gram matrices, and everything after it is algebra:
#
# $$F = \frac1N \sum_n g_n g_n^\top, \qquad g_n = \nabla_\theta\,\ell_n, \qquad K = G\,G^\top,
# \quad\text{the nonzero eigenvalues of } F \text{ are those of } K/N.$$
#
# $\ell_n$ is the loss of one observed token, so $F$ is the *empirical* Fisher.

# %%
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree
from transformers.utils import logging

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.models.huggingface import load, text_batches

logging.disable_progress_bar()
loaded = load(assets.checkpoint("final"))
text = assets.sample_text().read_text(encoding="utf-8")
batches = text_batches(loaded.tokenizer, text, task=loaded.task, context=32, num_tokens=248)
batches[0]["input_ids"].shape

# %% [markdown]
# ## A model as a pure function
#
# `functionalize` gives `apply(params, batch)` and the parameters to differentiate by. The module itself stays as it is.
# Tied tensors, here the embedding and the output layer, are one parameter.

# %%
fn = ff.functionalize(loaded.model)
print(f"{len(fn.params)} tensors, {sum(p.numel() for p in fn.params.values()):,} parameters")
fn.apply(fn.params, batches[0]).logits.shape

# %% [markdown]
# ## The one expensive pass
#
# One Gram matrix a parameter tensor, and which token each row is. The gradient matrix $G$ itself is never held.

# %%
grams = ff.token_grams(fn, fn.params, batches, ff.losses.causal_lm())
print(f"{grams.num_units} tokens, {grams.metadata['pass_time_s']:.1f} s")
{name: tuple(gram.shape) for name, gram in list(grams.grams.items())[:3]}

# %% [markdown]
# ## Everything after it is cheap
#
# Blocks are sums of Grams, centring and sequences are small matrix products: no further backward pass for any of these.

# %%
views = {
    "tokens, by layer": ff.spectrum_of_grams(grams, blocks=ff.by_layer),
    "tokens, by module": ff.spectrum_of_grams(grams, blocks=ff.by_module),
    "tokens, centred": ff.spectrum_of_grams(grams, center=True),
    "sequences": ff.spectrum_of_grams(grams, unit="sequence"),
    "the first 62 tokens": ff.spectrum_of_grams(grams.select(range(62))),
}
print(f"{'':22} {'N':>4} {'λ_max':>9} {'eff. rank':>9} {'trace':>9}")
for name, result in views.items():
    full = result.full
    values = (ff.metrics.largest(full), ff.metrics.effective_rank(full), ff.metrics.trace(full))
    print(f"{name:22} {full.num_tokens:4}", *(f"{value.item():9.2f}" for value in values))

# %% [markdown]
# The blocks leave the full matrix as it is, so the first two lines agree. What changes is the block-diagonal matrix, which
# leaves out the correlations between blocks; its trace is that of the full matrix.

# %%
for name in ("tokens, by layer", "tokens, by module"):
    diagonal = views[name].block_diagonal
    print(
        f"{name:18}",
        f"λ_max {ff.metrics.largest(diagonal).item():.3f}",
        f"trace {ff.metrics.trace(diagonal).item():.3f}",
        sep="   ",
    )
traces = [ff.metrics.trace(spectrum) for spectrum in views["tokens, by module"].blocks.values()]
torch.testing.assert_close(sum(traces), ff.metrics.trace(views["tokens, by module"].full), rtol=1e-6, atol=0.0)

# %% [markdown]
# ## Kernels, combinators, metrics
#
# A kernel is a function from a Gram to a spectrum; a combinator takes a kernel and returns one; a metric is a function of a spectrum.
# Any function of those types is as good as the package's.


# %%
def soft_threshold(inner, floor):
    """A kernel whose eigenvalues are shrunk by `floor`: what is left of the spectrum above it."""

    def kernel(gram):
        found = inner(gram)
        return replace(found, eigenvalues=(found.eigenvalues - floor).clamp(min=0))

    return kernel


def entropy(spectrum):
    share = spectrum.eigenvalues / spectrum.eigenvalues.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


plain = ff.kernels.gram_eigh()
kernels = {
    "as they are": plain,
    "centred": ff.kernels.centred(plain),
    "shrunk by 1": soft_threshold(plain, 1.0),
    "centred, shrunk by 1": ff.kernels.centred(soft_threshold(plain, 1.0)),
}
gram = grams.summed()
for name, kernel in kernels.items():
    print(f"{name:22} entropy {entropy(kernel(gram)).item():.3f}   trace {ff.metrics.trace(kernel(gram)).item():8.2f}")

# %% [markdown]
# ## Your own blocks and losses
#
# A block is what a function says of a parameter's name; a loss is any function of the output and the batch, one value per token.


# %%
def depth(name):
    return "lower half" if any(f"layers.{i}." in name for i in (0, 1)) else "upper half and ends"


def focal(output, batch):
    log_p = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return -((1 - log_p.exp()) ** 2) * log_p


halves = ff.spectrum_of_grams(grams, blocks=depth)
weighted = ff.fisher_spectrum(loaded.model, batches, loss=ff.losses.custom(focal, name="focal"), blocks=depth)
for name, result in (("causal_lm", halves), ("focal", weighted)):
    print(f"{name:10}", {label: round(ff.metrics.trace(part).item(), 1) for label, part in result.blocks.items()})

# %% [markdown]
# ## `vmap` over checkpoints
#
# Grams of several checkpoints, on the same tokens, stack as pytrees, and a function of one is mapped over the stack.


# %%
def grams_of(name):
    checkpoint = ff.functionalize(load(assets.checkpoint(name)).model)
    return ff.token_grams(checkpoint, checkpoint.params, batches, ff.losses.causal_lm(), blocks=ff.by_layer)


along = [grams_of(name) for name in assets.CHECKPOINTS]
stack = pytree.tree_map(lambda *tensors: torch.stack(tensors), *along)


def of_one(grams):
    spectrum = ff.kernels.centred(ff.kernels.gram_eigh())(grams.summed())
    return ff.metrics.trace(spectrum), ff.metrics.effective_rank(spectrum), entropy(spectrum)


mapped = torch.func.vmap(of_one)(stack)
for name, *values in zip(assets.CHECKPOINTS, *mapped, strict=True):
    print(f"{name:8}", *(f"{value.item():9.3f}" for value in values))
torch.testing.assert_close(mapped[1][2], of_one(along[2])[1])

# %% [markdown]
# ## The plot
#
# Solid down to the resolution of a float32 pass, faint below it.

# %%
ff.plots.spectrum(views["tokens, by module"]).figure

# %% [markdown]
# ## A check that needs nothing of this package
#
# One token's gradient by an ordinary backward pass: its squared norm is on the diagonal of the full Gram.

# %%
ids = batches[0]["input_ids"][:1]
logits = loaded.model(input_ids=ids).logits[0]
loss = torch.nn.functional.cross_entropy(logits[4], ids[0, 5])
rows = torch.autograd.grad(loss, list(loaded.model.parameters()))
by_hand = sum(row.double().square().sum() for row in rows)
torch.testing.assert_close(grams.block()[4, 4], by_hand, rtol=1e-4, atol=0.0)
by_hand.item()

# %% [markdown]
# ## What was found
#
# - One pass of 248 tokens gave every spectrum of the language model above: by layer, by kind of module, centred, of sequences, of a part of
#   the tokens, with kernels, blocks and metrics that were written here. Another loss, and another checkpoint, take a pass each.
# - Blocks and centring change little of the full matrix: the mean gradient holds 0.4 % of the trace. What the focal loss weighs down are
#   tokens that are predicted well, which had small gradients before; its trace is 17 % larger, as its slope is steeper elsewhere.
# - Over a stack of checkpoints `vmap` gives what a loop gives. The trace falls to 0.64 of its first value early in training and ends at
#   3.1 of it, while the entropy of the spectrum falls: fewer directions hold more.
