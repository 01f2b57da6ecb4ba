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
# # Why resampling gives no interval of a spectrum
#
# `ff.statistics.jackknife` and `ff.statistics.bootstrap` leave out or resample whole *sequences*, as the tokens of a sequence
# depend on each other. They give an interval of the trace, and of functions of your own, and of no other metric of the package:
# here is why. Do intervals of nominal 90 % hold the truth in 90 % of all samples? `ff.testing.coverage` draws samples of a
# population that is known and counts. What does hold of the population is in `ff.population`, and `docs/population.md` has how
# often.

# %%
from functools import partial
from time import perf_counter

import matplotlib.pyplot as plt

import fisherfunc as ff
from fisherfunc.testing import coverage

plt.rcParams |= {"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
LEVEL = 0.9
METRICS = {  # functions of our own: the package itself gives an interval of the first alone
    "trace": lambda spectrum: ff.metrics.trace(spectrum),
    "eigenvalue_1": lambda spectrum: spectrum.eigenvalues[..., 0],
    "eigenvalue_2": lambda spectrum: spectrum.eigenvalues[..., 1],
    "eigenvalue_5": lambda spectrum: spectrum.eigenvalues[..., 4],
    "effective_rank": lambda spectrum: ff.metrics.effective_rank(spectrum),
}
SHOWN = {
    "trace": "trace",
    "eigenvalue_1": "$\\lambda_1$",
    "eigenvalue_2": "$\\lambda_2$",
    "eigenvalue_5": "$\\lambda_5$",
    "effective_rank": "effective rank",
}
POPULATIONS = {
    "steep: $\\lambda_k = k^{-1.5}$, $k \\leq 40$": ([k**-1.5 for k in range(1, 41)], (5, 10, 20, 40)),
    "slow: $\\lambda_k = k^{-1}$, $k \\leq 300$": ([1 / k for k in range(1, 301)], (5, 10, 20, 40)),
}
bootstrap = partial(ff.statistics.bootstrap, metrics=METRICS, level=LEVEL, num_replicates=100)
METHODS = {
    "jackknife": partial(ff.statistics.jackknife, metrics=METRICS, level=LEVEL),
    "bootstrap, normal": bootstrap,
    "bootstrap, percentile": partial(bootstrap, method="percentile"),
}

# %% [markdown]
# The gradients of a sample are Gaussian with covariance diag(λ), and the four tokens of a sequence are correlated (ρ = 0.3), so
# that the Fisher's expectation is diag(λ). One population falls steeply and has 40 eigenvalues; the other falls slowly and
# has 300, more than 20 to 160 tokens can show. There are 200 samples a point, 60 where sequences are 40: the standard error
# of a coverage of 90 % is 2 or 4 %.

# %%
found, begin = {}, perf_counter()
for population, (eigenvalues, sizes) in POPULATIONS.items():
    for num_sequences in sizes:
        size = {"num_sequences": num_sequences, "num_tokens": 4, "num_samples": 200 if num_sequences < 40 else 60}
        for method, interval in METHODS.items():
            found[population, num_sequences, method] = coverage(interval, eigenvalues, **size)
print(
    f"{sum(next(iter(c.values())).num_samples for c in found.values()):,} spectra with intervals, {perf_counter() - begin:.0f} s"
)


# %%
def table(heading, cell):
    """Print three numbers for each population, number of sequences and metric."""
    print(heading)
    for population, (eigenvalues, sizes) in POPULATIONS.items():
        print(f"\n{population.split(':')[0]} ({len(eigenvalues)})", *(f"{name:>20}" for name in SHOWN))
        for size in sizes:
            methods = [found[population, size, method] for method in METHODS]
            cells = [cell(*(method[name] for method in methods)) for name in SHOWN]
            print(f"{size:10}", *(" ".join(f"{value:6.2f}" for value in values) for values in cells))


table("coverage: jackknife; bootstrap, normal; bootstrap, percentile", lambda *methods: [m.share for m in methods])

# %%
figure, axes = plt.subplots(2, len(SHOWN), figsize=(14, 6), layout="constrained", sharex=True, sharey=True)
for line, (population, (_, sizes)) in zip(axes, POPULATIONS.items(), strict=True):
    line[0].set(ylabel=f"coverage\n{population}")
    for axis, name in zip(line, SHOWN, strict=True):
        axis.axhspan(
            LEVEL - 0.04, LEVEL + 0.04, color="tab:gray", alpha=0.25, label="nominal 90 %, ± 2 errors of 200 samples"
        )
        for method, color in zip(METHODS, ("tab:blue", "tab:orange", "tab:red"), strict=True):
            shares = [found[population, size, method][name].share for size in sizes]
            axis.plot(sizes, shares, "o-", ms=4, color=color, label=method)
        axis.set(xscale="log", xticks=sizes, xticklabels=sizes, ylim=(-0.03, 1.03))
        axis.minorticks_off()
for axis, title in zip(axes[0], SHOWN.values(), strict=True):
    axis.set(title=title)
for axis in axes[1]:
    axis.set(xlabel="sequences of 4 tokens")
figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4);
# %% [markdown]
# **What holds.** Jackknife and normal bootstrap intervals of the trace, a mean over sequences, hold the truth about as often
# as they say, from ten sequences on. Those of the steep population's leading eigenvalues and effective rank come near it
# (84 to 88 %, of nominal 90 %) from 20 sequences on; $\lambda_5$ takes 40.
#
# **What falls short.** Where the spectrum falls slowly, intervals of leading eigenvalues are too short: of nominal 90 %,
# jackknife intervals of $\lambda_5$ hold 21 % with 5 sequences and 72 % with 40. Those of the effective rank hold nothing
# up to 20 sequences: a sample of 80 tokens cannot show 300 directions, and no resampling of it will tell.
# `ff.statistics.sample_limits` warns of that. Percentile intervals, here for comparison, miss as they do not know of the
# bias at all; only where it is small against the noise do they hold as much as the others, or more than they should.
#
# The reason is bias: leading eigenvalues of few samples are too large, and effective ranks too small.

# %%
table(
    "mean over samples, divided by the truth: the estimate; with its bias taken off by jackknife; by bootstrap",
    lambda jackknifed, normal, _: [
        value / jackknifed.truth
        for value in (jackknifed.mean_estimate, jackknifed.mean_corrected, normal.mean_corrected)
    ],
)

# %% [markdown]
# **What the correction does.** The jackknife takes off a bias that falls like 1/S with the number S of sequences. Of the slow
# population with 20 sequences it takes $\lambda_1$, $\lambda_2$ and $\lambda_5$ from 11, 17 and 33 % too large to 3, 2 and 5 %; the bootstrap
# does about the same for the first two, and less for $\lambda_5$ (12 %). With 5 sequences $\lambda_5$ stays 85 % too large, and the effective
# rank stays a third of the truth: such a bias does not fall like 1/S yet. Where the bias is small to begin with, there is
# little to take off, and for $\lambda_5$ of the steep population with 5 sequences the correction makes it worse (from 9 % to 24 %).
#
# **What this does not show.** Gaussian gradients, sequences of equal length and one correlation; gradients of a model have
# heavier tails. Metrics that the sample sets, such as the numerical rank and the condition number, have no interval worth
# the name, and are left out here.
