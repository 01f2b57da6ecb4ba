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
# # Which tokens carry the leading eigenvector?
#
# The leading eigenvector of $F = \frac1N \sum_n g_n g_n^\top$ is a direction in the space of parameters, $v = \sum_n u_n g_n / \sqrt{\lambda N}$ with
# $\|u\| = 1$: a weighted sum of gradients of tokens. So the share $u_n^2$ says how much of it is token $n$. Is it one token, or a pattern that
# many tokens have, and would other text show it as well?

# %%
import matplotlib.pyplot as plt
import torch
from transformers.utils import logging

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.models.huggingface import load, text_batches

logging.disable_progress_bar()
loaded = load(assets.checkpoint("final"))
text = assets.sample_text().read_text(encoding="utf-8")
batches = text_batches(loaded.tokenizer, text, task=loaded.task, context=32, num_tokens=496)
fn, loss = ff.functionalize(loaded.model), ff.losses.causal_lm()
pairs = ff.fisher_eigenvectors(loaded.model, batches, num=5, loss=loss)
print(f"{'vector':>6} {'λ':>8} {'in other text':>14}")  # vᵀ F v of sequences that v was not made from, over λ
for k, (value, outside) in enumerate(zip(pairs.eigenvalues, pairs.out_of_sample, strict=True), start=1):
    print(f"{k:6} {value.item():8.2f} {(outside / value).item():14.2%}")

# %% [markdown]
# ## The tokens, in their context
#
# The five that carry most of each of the first three vectors.

# %%
for row in ff.directions.leading_tokens(pairs, batches, loss, top=5, decode=loaded.tokenizer.decode):
    if row.vector < 3:
        context = f"{row.before}[{row.text}]{row.after}".replace("\n", " ")
        print(f"{row.vector + 1}  share {row.share:6.1%}  loss {row.loss:5.2f}   {context}")

# %% [markdown]
# ## How many tokens is it?
#
# From the same pass: the eigenvectors $u$ of the Gram matrix, of the full matrix and of each block. The participation number
# $1/\sum_n u_n^4$ is 1 where one token is all, and $N$ where all have equal shares.

# %%
grams = ff.token_grams(fn, fn.params, batches, loss, blocks=ff.by_layer)
matrices = {**{label: gram.matrix for label, gram in grams.items()}, "full": grams.block()}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for label, matrix in matrices.items():
    vectors = torch.linalg.eigh(matrix.double()).eigenvectors.flip(-1)
    numbers = 1 / vectors.pow(4).sum(0)
    left.plot(range(1, 101), numbers[:100], label=label, color="black" if label == "full" else None)
    print(f"{label:12} first vector: {numbers[0].item():5.1f} tokens, of {len(matrix)}")
left.set(xscale="log", yscale="log", xlabel="vector", ylabel="tokens that carry it, $1/\\sum u_n^4$")
left.legend(fontsize=8)
norms = matrices["full"].diagonal().double()
first = torch.linalg.eigh(matrices["full"].double()).eigenvectors[:, -1].square()
right.loglog(norms, first, ".", ms=4)
right.set(xlabel="squared norm of the gradient of a token", ylabel="its share of the first vector");

# %% [markdown]
# ## What was found
#
# - The leading eigenvectors of 496 tokens are single tokens: one holds 87 % of the first, 83 % of the second and 98 % of the third. They are
#   pieces of words that the model did not see coming, as in "Gentlemen" at the beginning of an address, of losses between 3 and 8 nats.
# - It differs by layer: of layers 1 and 2 the first vector is one token, of the embedding it is 27, and of the final norm 95, in which many
#   tokens agree.
# - A large gradient makes a leading vector, not a large loss alone: the share goes with the squared norm of the gradient, which is on the
#   diagonal of the Gram matrix.
# - So these directions hardly exist in other text: of their eigenvalues, sequences that they were not made from show 0.4 to 8 %. Other
#   tokens, and above all more of them, would give others.
