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
# # How many tokens do I need?
#
# Most numbers of a Fisher spectrum are properties of the tokens that it was taken of, and move with their number N. Which of
# them are constants, and from how many tokens on? All windows of two models' texts are passed over once: the embedded language
# model and a small network on digits. Subsets of their windows, spread evenly, are then asked for what is printed of the sample
# and for what `ff.population` says of the text.

# %%
import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import fisherfunc as ff
from fisherfunc.assets import checkpoint, sample_text
from fisherfunc.models.huggingface import load, text_batches

plt.rcParams |= {"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}


def language_model():
    loaded = load(str(checkpoint("final")))
    batches = text_batches(
        loaded.tokenizer, sample_text().read_text(encoding="utf-8"), task=loaded.task, context=64, num_tokens=2016
    )
    fn = ff.functionalize(loaded.model)
    return ff.token_grams(fn, fn.params, batches, ff.losses.causal_lm(), blocks=ff.by_layer)


def digits():
    """After 150 steps of training; each image is a token, and its own sequence."""
    data = load_digits()
    inputs, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, (inputs, labels), ff.losses.classification(), blocks=ff.by_layer)


POOLS = {"language model": language_model(), "digits": digits()}
SHARES = (1 / 6, 1 / 4, 1 / 2, 1)
for name, grams in POOLS.items():
    print(f"{name}: {grams.num_units:,} tokens of {len(grams.tokens.sequence.unique()):,} sequences")


# %%
def subset(grams, share):
    """So many of the sequences, spread evenly."""
    sequences = grams.tokens.sequence.unique()
    count = max(5, round(share * len(sequences)))
    chosen = sequences[torch.arange(count) * len(sequences) // count]
    return grams.select(torch.isin(grams.tokens.sequence, chosen))


results = {
    name: [ff.spectrum_of_grams(subset(grams, share), population=True) for share in SHARES]
    for name, grams in POOLS.items()
}


def numbers(result):
    """{name: (of the sample, of the population and its ends)}; of λ₁ no ends where the package prints none."""
    found, bracket = result.population, result.population.leading_eigenvalue
    ratio, error = found.participation_ratio.full, found.block_diagonal_error
    ends = (bracket.low, bracket.high) if bracket.warning is None else (math.nan, math.nan)
    return {
        "$\\lambda_1$": (ff.metrics.largest(result.full).item(), None, *ends),
        "participation ratio": (
            ff.metrics.participation_ratio(result.full).item(),
            ratio.estimate,
            ratio.low,
            ratio.high,
        ),
        "block-diagonal error": (result.coupling.block_diagonal_error, error.estimate, error.low, error.high),
        "effective rank": (
            ff.metrics.effective_rank(result.full).item(),
            None,
            found.effective_rank.low,
            found.effective_rank.high,
        ),
    }


for name, some in results.items():
    print(f"\n{name}: of the sample → of the population")
    for result in some:
        cells = []
        for own, point, low, high in numbers(result).values():
            ends = "–" if math.isnan(low) else f"{low:.3g} … {high:.3g}"
            cells.append(f"{own:7.3g} → " + (ends if point is None else f"{point:.3g}"))
        print(f"{result.full.num_tokens:6,}", *(f"{cell:>26}" for cell in cells))

# %%
figure, axes = plt.subplots(2, 4, figsize=(14, 6), layout="constrained")
for line, (name, some) in zip(axes, results.items(), strict=True):
    counts = [result.full.num_tokens for result in some]
    for axis, what in zip(line, numbers(some[0]), strict=True):
        own, point, low, high = zip(*(numbers(result)[what] for result in some), strict=True)
        axis.fill_between(counts, low, high, color="tab:green", alpha=0.2, label="of the population, 95 %")
        if point[0] is not None:
            axis.plot(counts, point, "o-", ms=4, color="tab:green", label="of the population")
        axis.plot(counts, own, "s--", ms=4, color="tab:red", label="of the tokens")
        axis.set(xscale="log", yscale="log", title=what)
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.set_xticks([], minor=True)
    line[0].set(ylabel=name)
for axis in axes[1]:
    axis.set(xlabel="tokens")
figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=3);
# %% [markdown]
# **What is a constant, and what is not.** Of the language model, the participation ratio of the tokens grows as they do, to 568
# of 2,016 tokens, where that of the text is some 2,400 from 504 tokens on; what the block-diagonal matrix leaves out is 0.77 to
# 0.81 of the tokens and 0.49 to 0.51 of the text. λ₁ of the tokens falls like 1/N, as it is one token; what that of the text lies
# between becomes narrower around the same place. The effective rank is open by a factor of ten and more: no number of tokens
# here shows it. Of the digits, whose gradients have few directions, the tokens come close to the population: at 1,797 of them
# the participation ratio is a tenth below. Some images contribute so much more than others that larger ones are likely unseen,
# so that λ₁ has no bracket.
#
# **The rule.** Each token counts with itself, so that ‖F̂‖² = ‖F‖² + f/N on average. From f, which one result gives, follows from
# how many tokens on a number *of the tokens* is within 10 % of that of the population; the interval of an *estimate* is so wide
# from where its half width, which falls like 1/√N, says.

# %%
for name, some in results.items():
    print(name)
    for result in some:
        needed = ff.tokens_needed(result)
        cells = [f"{what}: {n.sample or '–':>9} {n.population or '–':>9}" for what, n in needed.items()]
        print(f"{result.full.num_tokens:6,}", *cells, sep="   ")

# %% [markdown]
# For each number: of the tokens, then as estimated. The participation ratio of the language model's tokens would be within 10 %
# from some 66,000 to 93,000 tokens on, as said by 500 tokens and by 2,000 alike; its estimate from some 10,000, of which eight
# windows, whose interval is wide, say 25,000; what the block-diagonal matrix leaves out, as estimated, from some hundreds. Where
# contributions of sequences differ so much that no interval of a moment holds, as of the digits' trace, nothing is said.
#
# So: run some hundred tokens of eight windows or more, read the line "Within 10 % from so many tokens on" below the table (it is
# `ff.tokens_needed(result)`), and take so many. `ff.plan(…, pilot=result)` has the numbers beside the seconds that they cost.
