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
# # First steps
#
# What does the Fisher information of a language model look like, block by block, and how far can each number be trusted? This
# takes the model and the text that come with the package, and ends with a page to pass on.
#
# $$F = \frac1N \sum_n g_n g_n^\top, \qquad g_n = \nabla_\theta\,\ell_n,$$
#
# a term for each predicted token $n$, evaluated alone. The losses are those of the observed tokens: $F$ is the *empirical* Fisher.

# %%
import matplotlib.pyplot as plt
from transformers.utils import logging

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.models.huggingface import load, text_batches

logging.disable_progress_bar()
loaded = load(assets.checkpoint("final"))
text = assets.sample_text().read_text(encoding="utf-8")
batches = text_batches(loaded.tokenizer, text, task=loaded.task, context=32, num_tokens=248)

# %% [markdown]
# ## What would it take?
#
# A plan looks at the model and the batch, and at no more than a few tokens.

# %%
plan = ff.plan(loaded.model, batches)
plan

# %% [markdown]
# ## The spectrum
#
# All eigenvalues, of every block, of the block-diagonal and of the full matrix, which is never formed.

# %%
result = ff.fisher_spectrum(loaded.model, batches, plan=plan)
result

# %% [markdown]
# ## Pictures
#
# Each is a function to axes of your own figure. Lines are faint below the resolution, where eigenvalues are round-off.

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
ff.plots.spectrum(result, ax=axes[0])
ff.plots.profile(result, "effective_rank", ax=axes[1])
ff.plots.couplings(result, ax=axes[2]);
# %% [markdown]
# ## These tokens, and the text
#
# Most numbers of the table move with the number of tokens. What holds of the text, of which these are a sample, has an interval.

# %%
found = result.population
trace, leading = found.trace.full, found.leading_eigenvalue
ratio = found.participation_ratio.full
print(f"trace                 {ff.metrics.trace(result.full).item():9.1f}   text: {trace.low:.0f} to {trace.high:.0f}")
print(
    f"largest eigenvalue    {ff.metrics.largest(result.full).item():9.1f}   text: {leading.low:.1f} to {leading.high:.1f}"
)
print(
    f"participation ratio   {ff.metrics.participation_ratio(result.full).item():9.1f}   text: {ratio.low:.0f} to {ratio.high:.0f}"
)
check = result.metadata["self_check"]
print(f"\nheld against an ordinary backward pass: off by {check['difference']:.1e}, allowed {check['tolerance']:.0e}")
ff.plots.effective_dimension(result).figure

# %% [markdown]
# ## A page to pass on
#
# `result.save_html("report.html")` writes all of this as one file; `fisherfunc report` does so for a folder of results.

# %% [markdown]
# ## What was found
#
# - Of 504,672 eigenvalues at most 248 are not zero, one for each token. They fall slowly: it takes an effective rank of 139
#   directions to describe them, and no layer is described by a few.
# - The numbers of the table are those of *these* tokens. The trace is as good an estimate of the text's as any, but the largest
#   eigenvalue, 106, is three times what that of the text can be, and the participation ratio, 87, a tenth or less of it: with 248
#   tokens each is a direction of its own. The intervals say so; [how many tokens it takes](how_many_tokens.ipynb) is another notebook.
# - The layers hang together in these tokens, as the couplings show; the block-diagonal matrix is no good stand-in for the full one.
# - The run held itself against an ordinary backward pass, to six digits.
