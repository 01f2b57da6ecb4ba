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
# # The spectrum along training
#
# How does the spectrum change while a language model is trained: does it follow the loss, and is it the same in all layers?
# Four checkpoints of one training run come with the package. Here is the empirical Fisher of each, on the same tokens of
# a text that none of them was trained on.

# %%
import matplotlib.pyplot as plt
from transformers.utils import logging

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.models.huggingface import load, text_batches

logging.disable_progress_bar()
NUM_TOKENS = 252

card = assets.model_card()
text = assets.sample_text().read_text(encoding="utf-8")


def spectrum_of(name):
    loaded = load(assets.checkpoint(name))
    batches = text_batches(loaded.tokenizer, text, task=loaded.task, context=64, num_tokens=NUM_TOKENS)
    return ff.fisher_spectrum(loaded.model, batches, loss=ff.losses.causal_lm(), num_tokens=NUM_TOKENS)


results = {name: spectrum_of(name) for name in assets.CHECKPOINTS}

# %%
headings = f"{'':8} {'steps':>6} {'held-out loss':>13} {'loss here':>9}"
print(headings, f"{'λ_max':>9} {'trace':>9} {'λ_max/trace':>11} {'eff. rank':>9}")
for name, result in results.items():
    facts, full = card["checkpoints"][name], result.full
    largest, trace = ff.metrics.largest(full).item(), ff.metrics.trace(full).item()
    print(
        f"{name:8} {facts['step']:6} {facts['held_out_loss']:13.3f} {result.metadata['mean_loss']:9.3f}",
        f"{largest:9.3f} {trace:9.2f} {largest / trace:11.2f} {ff.metrics.effective_rank(full).item():9.1f}",
    )

# %%
labels = list(results["final"].blocks)
positions = range(len(labels))
columns = {
    "largest eigenvalue": ff.metrics.largest,
    "trace": ff.metrics.trace,
    "effective rank": ff.metrics.effective_rank,
}
colors = dict(zip(results, plt.get_cmap("viridis")([0.0, 0.35, 0.65, 0.9]), strict=True))
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for axis, (title, metric) in zip(axes, columns.items(), strict=True):
    for name, result in results.items():
        values = [metric(result.blocks[label]).item() for label in labels]
        label = f"{name} ({card['checkpoints'][name]['step']:,} steps)"
        axis.plot(positions, values, marker="o", color=colors[name], label=label)
    axis.set_xticks(positions, labels, rotation=45, ha="right")
    axis.set(title=f"{title}, by layer", yscale="linear" if metric is ff.metrics.effective_rank else "log")
    axis.grid(alpha=0.3)
axes[0].legend(fontsize=8);
# %%
figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
for name, result in results.items():
    spectrum = result.full
    eigenvalues = spectrum.eigenvalues[spectrum.eigenvalues > spectrum.resolution]
    axis.loglog(range(1, len(eigenvalues) + 1), eigenvalues, color=colors[name], label=name)
axis.set(xlabel="rank $k$", ylabel=r"eigenvalue $\lambda_k$", title="The full empirical Fisher along training")
axis.legend();

# %% [markdown]
# ## What is seen
#
# - The loss falls all the way; the spectrum does not move one way. From initialisation to the early checkpoint, λ_max and
#   trace drop to about half; then both rise, and at the end λ_max is more than four times, the trace 2.7 times what they
#   were at initialisation. A smaller loss does not mean smaller gradients: a model that is surer of itself pays more
#   where it is wrong.
# - The spectrum becomes more concentrated: λ_max holds 3 % of the trace at first and 5 % at the end, and the effective
#   rank falls from a peak of about 175, early, to about 124, of at most N = 252.
# - The layers part early: in the first 120 steps the traces of layers 1 to 3 fall ten- to thirtyfold, while the
#   embedding (tied to the output layer) and layer 0 stay about where they were. Later they grow back.
#
# What this does not show: it is one run, one seed, one text of 252 tokens, and the *empirical* Fisher, whose gradients are
# those of the observed tokens. With N tokens no more than N eigenvalues can be seen, so effective ranks of different N
# cannot be compared.
