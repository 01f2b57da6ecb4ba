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
# # Known science, reproduced
#
# Does what the literature says of the spectra of neural networks come out, where every spectrum is exact? Five results: the
# paper's claim in a sentence, our figure, and where the two differ. Two matrices are met, of the same model and inputs:
#
# $$F = \frac1N \sum_n \sum_c p_{nc}\, g_{nc}\, g_{nc}^\top, \qquad
# F_\text{emp} = \frac1N \sum_n g_{n y_n} g_{n y_n}^\top, \qquad g_{nc} = \nabla_\theta \log p_{nc}.$$
#
# $F$ is the true Fisher, whose targets are the model's own (`ff.targets.all_classes()`; it is the generalised Gauss-Newton
# matrix), $F_\text{emp}$ the empirical one, of observed targets $y_n$. A regression with outputs $f$ has unit variance, and
# the rows of its true Fisher are $\nabla f_c$.
#
# The functions defined here are the ones that `tests/repository/test_known_science.py` holds to closed forms and to brute force.

# %% tags=["definitions"]
import math

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import fisherfunc as ff

# %%
import matplotlib.pyplot as plt

plt.rcParams |= {"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}


# %% [markdown]
# ## 1. Pure noise: the Marchenko-Pastur law
#
# **Claim** (Marchenko and Pastur 1967). The eigenvalues of $\frac1N X^\top X$, with $N \times P$ independent entries of unit
# variance in $X$, fill the interval $(1 \pm \sqrt{P/N})^2$ with one density that depends on $P/N$ only, though the population
# has a single eigenvalue, 1.
#
# The rows of the true Fisher of a linear regression are its inputs, so Gaussian inputs give Gaussian rows. Those of the
# empirical Fisher are $r_n x_n$, with residuals $r_n$; here the model is right, so that $r_n$ has unit variance and both
# matrices have the same expectation, the identity.


# %% tags=["definitions"]
def marchenko_pastur(ratio):
    """The law of the nonzero eigenvalues of (1/N) Σ x xᵀ, x ~ N(0, 1) in P = ratio · N dimensions, ratio not 1.

    Returns eigenvalues from edge to edge, the density there, and its integral.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    grid = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0, math.pi, 4001))
    density = np.sqrt(((high - grid) * (grid - low)).clip(min=0)) / (2 * math.pi * min(ratio, 1) * grid)
    pieces = np.diff(grid) * (density[1:] + density[:-1]) / 2
    return grid, density, np.concatenate([[0], pieces.cumsum()])


def distance_to_law(eigenvalues, ratio):
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    grid, _, integral = marchenko_pastur(ratio)
    law = np.interp(np.sort(eigenvalues), grid, integral)
    steps = np.arange(len(law) + 1) / len(law)
    return max(np.abs(steps[1:] - law).max(), np.abs(steps[:-1] - law).max())


def linear_regression(num_rows, weights, *, noise, targets, seed=0):
    """Eigenvalues of the Fisher of f(x) = 0 · x with unit variance, where y = w · x + noise · N(0, 1), x ~ N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_rows, len(weights), generator=generator, dtype=torch.float64)
    y = inputs @ weights + noise * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    model = nn.Linear(len(weights), 1, bias=False).double()
    nn.init.zeros_(model.weight)
    batch, loss = (inputs, y[:, None]), ff.losses.regression()
    return ff.fisher_spectrum(
        model, batch, loss=loss, targets=targets, blocks=ff.whole, population=False
    ).full.eigenvalues


# %%
cases = [
    ("true Fisher", 1200, 600, ff.targets.all_classes()),
    ("true Fisher", 600, 1200, ff.targets.all_classes()),
    ("empirical Fisher", 1200, 600, ff.targets.observed()),
]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
print(f"{'':18}{'N':>5} {'P':>5}   smallest and largest eigenvalue   edges of the law   distance to the law")
for axis, (fisher, num_rows, num_params, targets) in zip(axes, cases, strict=True):
    zero, ratio = torch.zeros(num_params, dtype=torch.float64), num_params / num_rows
    eigenvalues = linear_regression(num_rows, zero, noise=1.0, targets=targets).numpy()
    grid, density, _ = marchenko_pastur(ratio)
    axis.hist(
        eigenvalues, bins=50, density=True, color="tab:blue", alpha=0.5, label=f"{fisher}, {len(eigenvalues)} nonzero"
    )
    axis.plot(grid, density, color="tab:red", label="Marchenko-Pastur")
    axis.set(title=f"{fisher}: N = {num_rows}, P = {num_params}", xlabel="eigenvalue λ", ylabel="density")
    axis.legend()
    print(
        f"{fisher:18}{num_rows:5} {num_params:5}   {eigenvalues.min():8.3f} {eigenvalues.max():8.3f}",
        f"{grid[0]:24.3f} {grid[-1]:8.3f} {distance_to_law(eigenvalues, ratio):15.3f}",
    )


# %% [markdown]
# **Agreement.** The two true Fishers follow the law: the distribution functions differ by 0.005 and 0.006 at most, and the
# extreme eigenvalues are at the edges, within 6 % at the lower and 0.3 % at the upper one.
#
# **Difference.** The empirical Fisher does not (distance 0.20; its largest eigenvalue, 8.96, is three times the edge): its
# entries are uncorrelated, of unit variance, but not independent, as one residual scales a whole row. So an eigenvalue of
# an empirical Fisher beyond the Marchenko-Pastur edge is no sign of structure in the model by itself.
#
# ## 2. As many outliers as classes, and their hierarchy
#
# A multilayer perceptron with 8,970 parameters is trained on the digits of scikit-learn, until it fits them perfectly. The
# Fishers of sections 2 and 3 are of 150 training digits, 15 a class, which with ten classes each are 1,500 rows.


# %% tags=["definitions"]
def digits():
    """The 1,797 digits of scikit-learn: inputs (n, 64), each pixel centred, and classes."""
    data = load_digits()
    inputs = torch.tensor(data.data) / 16
    return inputs - inputs.mean(dim=0), torch.tensor(data.target)


def classifier(width, *, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    return nn.Sequential(*layers).double()


def training(model, inputs, classes, steps, *, seed=0):
    """Train by stochastic gradient descent with momentum, and stop at each of these steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(max(steps) + 1):
        if step in steps:
            yield step
        batch = torch.randint(len(inputs), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), classes[batch]).backward()
        optimizer.step()


def true_fisher(model, inputs, classes):
    """The Gram K of rows √p_c ∇ log p_c, ten a digit, one after the other; and p (n, 10)."""
    fn = ff.functionalize(model)
    loss, targets = ff.losses.classification(), ff.targets.all_classes()
    grams = ff.token_grams(fn, fn.params, (inputs, classes), loss, targets=targets, blocks=ff.whole)
    with torch.no_grad():
        return grams.block(), model(inputs).softmax(dim=-1)


def eigenvalues_of(gram):
    return torch.linalg.eigvalsh(gram).flip(0)


def cross_class_parts(p, classes):
    """Papyan's parts of the true Fisher, each as coefficients B of the rows G: the part is (B G)ᵀ (B G)."""
    num, count = p.shape
    same = torch.eye(count, dtype=p.dtype)
    member = same[classes]
    weight = member.T @ p / num  # w_cc' = (1/N) Σ_{n of class c} p_nc'
    mean = torch.einsum("nc,nt,tu->ctnu", member, p.sqrt(), same).flatten(2) / (num * weight[..., None])  # g_cc'
    others = weight * (1 - same)
    class_mean = torch.einsum("ct,ctr->cr", others / others.sum(dim=1, keepdim=True), mean)  # g_c
    apart = weight.sqrt()[..., None] * (mean - class_mean[:, None])
    return {
        "class means": others.sum(dim=1).sqrt()[:, None] * class_mean,
        "cross-class": apart[same == 0],
        "own class": (weight.sqrt()[..., None] * mean)[same == 1],
    }


def share_in_span(part, gram, eigenvalues, vectors):
    """‖Q v‖² for unit eigenvectors v of Gᵀ G, with Q the projection on the span of B G; λ and u are those of K = G Gᵀ."""
    along = part @ vectors * eigenvalues.sqrt()  # B G v, as v = Gᵀ u / √λ
    inverse = torch.linalg.pinv(part @ gram @ part.T, rtol=1e-10, hermitian=True)
    return (along * (inverse @ along)).sum(dim=0)


def largest_gap(eigenvalues, *, among=30):
    """After which of the leading eigenvalues λ_k / λ_k+1 is largest, and that ratio."""
    ratios = eigenvalues[:among] / eigenvalues[1 : among + 1]
    return int(ratios.argmax()) + 1, ratios.max().item()


def both_fishers(gram, p, classes, largest, *, damping=1e-3):
    """The empirical beside the true Fisher, from the Gram of the true one: g_n is row (n, y_n) over √p.

    `largest` is λ_max of the true one. The steps are (F + γI)⁻¹ ∇L of either, γ = damping · λ_max.
    """
    num, count = p.shape
    own, scale = torch.arange(num) * count + classes, p[torch.arange(num), classes].rsqrt()
    between = scale[:, None] * gram[own]  # empirical rows against true ones
    empirical = between[:, own] * scale
    empirical_largest = torch.linalg.eigvalsh(empirical)[-1] / num
    inner, true_norm, empirical_norm = between.square().sum(), gram.square().sum(), empirical.square().sum()
    mean = torch.full((num,), 1 / num, dtype=p.dtype)  # the mean gradient is a sum of empirical rows
    one, other = torch.eye(num, dtype=p.dtype), torch.eye(len(gram), dtype=p.dtype)
    step = torch.linalg.solve(empirical / num + damping * empirical_largest * one, mean)
    start = torch.zeros(len(gram), dtype=p.dtype).index_add(0, own, scale * mean)
    natural = torch.linalg.solve(gram / num + damping * largest * other, start)
    lengths = ((step @ empirical @ step) * (natural @ gram @ natural)).sqrt()
    return {
        "trace, empirical": empirical.trace().item() / num,
        "trace, true": gram.trace().item() / num,
        "λ_max, empirical": empirical_largest.item(),
        "λ_max, true": float(largest),
        "cosine": (inner / (true_norm * empirical_norm).sqrt()).item(),
        "distance": ((true_norm + empirical_norm - 2 * inner) / true_norm).sqrt().item(),
        "cosine of steps": ((step @ between @ natural) / lengths).item(),
    }


# %%
inputs, classes = digits()
order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
train, held_out = order[:1400], order[1400:]
probe = torch.cat([train[classes[train] == c][:15] for c in range(10)])  # 150 of the training digits

model, found = classifier(64), {}
for step in training(model, inputs[train], classes[train], steps=(0, 10, 30, 100, 300, 1000, 3000)):
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs[train]), classes[train]).item()
        right = (model(inputs[held_out]).argmax(dim=-1) == classes[held_out]).double().mean().item()
    found[step] = loss, right, *true_fisher(model, inputs[probe], classes[probe])
num_params = sum(parameter.numel() for parameter in model.parameters())
print(f"P = {num_params:,} parameters, N = {len(probe)} digits, {10 * len(probe):,} rows")

# %% [markdown]
# **Claim** (Sagun, Evci, Güney, Dauphin and Bottou 2017). The spectrum of the Hessian has a bulk near zero and outliers away
# from it, and it is the data that set the outliers: there are about as many as classes. Here it is the true Fisher, the
# Gauss-Newton part of the Hessian, that is looked at.
#
# An outlier is counted by the largest gap: the rank $k \le 30$ after which $\lambda_k / \lambda_{k+1}$ is largest.

# %%
print(f"{'step':>5} {'train loss':>10} {'held-out right':>14}   largest gap      gap after 9 and 10")
spectra = {step: eigenvalues_of(gram / len(probe)) for step, (_, _, gram, _) in found.items()}
for step, (loss, right, _, _) in found.items():
    values = spectra[step]
    place, ratio = largest_gap(values)
    print(
        f"{step:5} {loss:10.4f} {right:13.1%}    ×{ratio:5.2f} after {place:2}",
        f"    ×{values[8] / values[9]:5.2f}  ×{values[9] / values[10]:5.2f}",
    )

# %% [markdown]
# **Agreement.** The gap is after 9 = C − 1 before training and in its first steps, by factors of 18 and 12 (with four other
# seeds of weights and batches as well, by 9 to 19), and after 10 = C at step 30, by a factor of 1.6. C − 1 is what
# algebra says of an untrained network: its p is about the same for all digits, and the rows $\sqrt{p_c}\,\nabla \log p_c$ of a digit obey one linear relation, $\sum_c p_c \nabla \log p_c = 0$.
#
# **Difference.** While the classes are being learned, the rank of the largest gap depends on the seed: at step 30 it is 10
# here, and 1, 1, 9 and 8 with the four others, by factors of 1.5 to 1.9. From 100 steps on, the eigenvalues fall off without a gap at C, and the largest ratio is found at one rank
# or another. Once the digits are fitted, p (1 − p) is large for few of the 150 only, and these few carry F. Counting by gaps
# then says little; the decomposition that follows says more.
#
# **Claim** (Papyan 2020). The outliers come from C class means; the $C^2$ cross-class means, of the gradients of class c
# for target c′, give a second, lower group; the variation within these groups is the bulk.
#
# With $g_{cc'} = \sum_{n \in c} p_{nc'} g_{nc'} / \sum_{n \in c} p_{nc'}$, $w_{cc'} = \frac1N \sum_{n \in c} p_{nc'}$,
# $w_c = \sum_{c' \ne c} w_{cc'}$ and $g_c = \sum_{c' \ne c} w_{cc'} g_{cc'} / w_c$, the sum is exact:
#
# $$F = \underbrace{\sum_c w_c\, g_c g_c^\top}_\text{class means: C}
# + \underbrace{\sum_{c \ne c'} w_{cc'} (g_{cc'} - g_c)(g_{cc'} - g_c)^\top}_\text{cross-class: C² − 2C}
# + \underbrace{\sum_c w_{cc}\, g_{cc} g_{cc}^\top}_\text{own class}
# + F_\text{within}.$$
#
# All of these means are combinations of rows, so their eigenvalues, and the shares of F's eigenvectors in their spans, are
# algebra on the one Gram of the pass.

# %%
LEADING, SHOWN = 30, (0, 30, 3000)
COLORS = {"class means": "tab:red", "cross-class": "tab:orange", "all means": "tab:gray"}
figure, axes = plt.subplots(2, 3, figsize=(13, 6.4), layout="constrained", sharex="row")
print(f"{'':8} share of the trace of F                        largest eigenvalue")
print(f"{'step':>5} {'class means':>14} {'cross-class':>12} {'own class':>10} {'within':>8}", end=" ")
print(f"{'F':>10} {'class means':>12} {'cross-class':>12} {'all means':>10}")
for step, (above, below) in zip(SHOWN, axes.T, strict=True):
    _, _, gram, p = found[step]
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)[:, :LEADING]
    parts = cross_class_parts(p, classes[probe])
    parts["all means"] = torch.cat(list(parts.values()))
    of_part = {name: eigenvalues_of(part @ gram @ part.T) for name, part in parts.items()}
    values_of_f = values / len(probe)
    above.loglog(range(1, 201), values_of_f[:200], ".", color="tab:blue", ms=5, label="true Fisher F")
    for name, color in COLORS.items():
        if name != "all means":
            above.loglog(
                range(1, len(of_part[name]) + 1), of_part[name].clip(min=1e-99), ".", ms=5, color=color, label=name
            )
        share = share_in_span(parts[name], gram, values[:LEADING], vectors)
        below.plot(range(1, LEADING + 1), share, ".-", color=color, label=name)
    for axis in (above, below):
        axis.axvline(10.5, color="black", lw=0.8, ls=":")
    title = "before training" if step == 0 else f"after {step:,} steps, loss {found[step][0]:.2g}"
    above.set(title=title, xlabel="rank k (dotted: C = 10)", ylim=(values_of_f[0] * 1e-4, values_of_f[0] * 2))
    below.set(xlabel="rank k of the eigenvector of F", ylim=(0, 1.05))
    shares = [(of_part[name].sum() / values_of_f.sum()).item() for name in parts]
    print(f"{step:5} {shares[0]:14.2f} {shares[1]:12.2f} {shares[2]:10.2f} {1 - shares[3]:8.2f}", end=" ")
    largest = [of_part[name][0].item() for name in COLORS]
    print(f"{values_of_f[0]:10.3f} {largest[0]:12.3f} {largest[1]:12.3f} {largest[2]:10.3f}")
axes[0, 0].set(ylabel="eigenvalue")
axes[1, 0].set(ylabel="share of the eigenvector in the span")
axes[0, 0].legend(loc="lower left")
axes[1, 0].legend(loc="center right");
# %% [markdown]
# **Agreement.** The means are what makes the outliers: their largest eigenvalue is within 5 % of that of F at the three steps
# shown (at 100 and 300, which are not, it is 0.85 and 0.87 of it), and the ten leading eigenvectors lie in their span to 85 %
# or more. At the end of training the hierarchy is the claimed one:
# class means (largest eigenvalue 0.042, of 0.051 for F) above cross-class means (0.020), and the six leading eigenvectors lie
# in the span of the class means to three quarters or more.
#
# **Difference.** The hierarchy of sizes is the work of training. Before it, and still after 30 steps, the order is reversed:
# class means carry 1 % and 9 % of the trace, cross-class means 77 % and 53 %. That of directions is there from the start: the
# nine leading eigenvectors lie in the span of the class means to 91 % or more before the first step, as the cross-class means,
# which carry them then, have their leading directions there. And even at the end the groups overlap: the smallest
# class means lie below many cross-class ones, and there is no gap between the groups. Papyan's networks are far larger,
# with thousands of examples a class.
#
# ## 3. The empirical against the true Fisher
#
# **Claim** (Kunstner, Hennig and Balles 2019). The empirical Fisher does not capture second-order information in general;
# the conditions under which it approaches the true one, a model that is right and near its minimum, and enough data, are
# unlikely to be met in practice.
#
# Every row of the empirical Fisher is one of the true Fisher, times $p^{-1/2}$, so one Gram has both. Cosine and distance are
# $\langle F_\text{emp}, F\rangle / \|F_\text{emp}\| \|F\|$ and $\|F_\text{emp} - F\| / \|F\|$ in Frobenius' norm; the steps
# are $(F + \gamma I)^{-1} \nabla L$ with $\gamma = \lambda_\text{max} / 1000$ of either matrix. The last three columns have
# one label a digit drawn from the model instead: an estimate of the true Fisher without bias.

# %%
generator = torch.Generator().manual_seed(0)
print(f"{'':10} empirical over true         F_emp against F             the same, labels drawn from the model")
print(f"{'step':>5} {'trace':>10} {'λ_max':>8} {'cosine':>10} {'distance':>9} {'cosine of steps':>16}", end=" ")
print(f"{'trace':>12} {'λ_max':>8} {'cosine':>8}")
both = {}
for step, (_, _, gram, p) in found.items():
    both[step] = values = both_fishers(gram, p, classes[probe], spectra[step][0])
    drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)
    drawn = both_fishers(gram, p, drawn, spectra[step][0])
    values["cosine, drawn labels"] = drawn["cosine"]
    print(
        f"{step:5} {values['trace, empirical'] / values['trace, true']:10.3f}",
        f"{values['λ_max, empirical'] / values['λ_max, true']:8.3f} {values['cosine']:10.3f} {values['distance']:9.3f}",
        f"{values['cosine of steps']:16.3f} {drawn['trace, empirical'] / values['trace, true']:12.3f}",
        f"{drawn['λ_max, empirical'] / values['λ_max, true']:8.3f} {drawn['cosine']:8.3f}",
    )

# %%
steps = list(both)
position = range(len(steps))
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
for name, style in (("trace", "-"), ("λ_max", "--")):
    for fisher, color in (("true", "tab:blue"), ("empirical", "tab:red")):
        values = [both[step][f"{name}, {fisher}"] for step in steps]
        axes[0].semilogy(position, values, style, marker="o", ms=4, color=color, label=f"{name} of the {fisher} Fisher")
axes[0].set(ylabel="λ_max, trace")
for name, label in (("cosine", "labels of the digits"), ("cosine, drawn labels", "labels drawn from the model")):
    axes[1].plot(position, [both[step][name] for step in steps], "o-", ms=4, label=label)
axes[1].set(ylabel="cosine of the two matrices", ylim=(0, 1.05))
axes[2].plot(position, [both[step]["cosine of steps"] for step in steps], "o-", ms=4, color="tab:green")
axes[2].set(ylabel="cosine of (F + γI)⁻¹∇L of the two", ylim=(0, 1.05))
for axis in axes:
    axis.set_xticks(position, [f"{step:,}" for step in steps])
    axis.set(xlabel="training steps")
axes[0].legend(fontsize=8)
axes[1].legend(loc="lower left", fontsize=8);
# %% [markdown]
# **Agreement.** Before training the labels are as good as drawn from the model, which knows nothing, and the two are alike: trace
# and λ_max within 6 %, cosine 0.92. Training drives them apart. The cosine falls to 0.64 after 100 steps, and that of the
# two steps to 0.22; then the residuals vanish, and with them the empirical Fisher: at the end its trace is 0.2 % of that of
# the true one, its λ_max 0.4 %, and its distance from it 0.998.
#
# **Difference.** What is lost at the end is scale rather than shape: the cosine rises again, to 0.89, since the same few
# unsure digits dominate both matrices. And not all of the distance is the fault of the empirical Fisher: labels drawn from
# the model give matrices that are right on average but, at one draw a digit, not closer (cosines 0.54 and 0.15 after 100 and
# 300 steps). In the end a draw is always the likely label, and the estimate misses what only rare draws would show:
# `all_classes()` has no such noise.

# %% [markdown]
# ### The same in a linear regression
#
# Kunstner, Hennig and Balles show it in a least-squares problem. With $x \sim N(0, I)$, noise of variance $\sigma^2$ and the
# weights at distance $d$ from the minimum, the true Fisher is $I$ everywhere, and the empirical one has the expectation
# $(\sigma^2 + d^2)\, I + 2\,\Delta\Delta^\top$: eigenvalues $\sigma^2 + 3d^2$ along the error and $\sigma^2 + d^2$ across it.

# %%
distances, curve = (0.0, 0.5, 1.0, 1.5, 2.0), torch.linspace(0, 2, 100)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
for axis, noise in zip(axes, (1.0, 2.0), strict=True):
    for targets, color, name in (
        (ff.targets.observed(), "tab:red", "empirical"),
        (ff.targets.all_classes(), "tab:blue", "true"),
    ):
        found_values = [
            linear_regression(1500, torch.tensor([d, 0.0], dtype=torch.float64), noise=noise, targets=targets)
            for d in distances
        ]
        for k, marker in ((0, "o"), (1, "s")):
            label = f"{name} Fisher, λ_{k + 1}"
            axis.plot(distances, [values[k] for values in found_values], marker, color=color, label=label)
        print(f"noise {noise}, {name:9} Fisher, λ_1 and λ_2 at each distance:", end=" ")
        print("  ".join(f"{values[0]:.2f} {values[1]:.2f}" for values in found_values))
    axis.plot(curve, noise**2 + 3 * curve**2, color="tab:red", lw=1, label="σ² + 3d²")
    axis.plot(curve, noise**2 + curve**2, color="tab:red", lw=1, ls="--", label="σ² + d²")
    axis.axhline(1, color="tab:blue", lw=1)
    axis.set(title=f"noise of standard deviation σ = {noise:.0f}", xlabel="distance d from the minimum")
axes[0].set(ylabel="eigenvalue")
axes[0].legend(fontsize=8);
# %% [markdown]
# **Agreement.** Only at the minimum of the right model (σ = 1, d = 0) do the two agree, there up to the sampling noise of
# N = 1,500, below 10 %. With twice the noise the empirical Fisher is four times too large at the minimum; away from it, it
# grows with the residuals, most in the direction in which the step should be long.
#
# **Difference.** None beyond that noise, which the fourth powers of Gaussians make large: 7 % at most.
#
# ## 4. Wide random networks
#
# **Claim** (Karakida, Akaho and Amari 2019). In random networks of large width M, with C outputs, N Gaussian inputs and
# unit-variance regression, the P ≈ αM² eigenvalues of the Fisher have, with κ₁ and κ₂ from mean-field recursions,
#
# $$\text{mean} \sim \frac{\kappa_1 C}{M}, \qquad
# \text{second moment} \sim \alpha \Big(\frac{N-1}{N} \kappa_2^2 + \frac{\kappa_1^2}{N}\Big) C, \qquad
# \lambda_\text{max} \sim \alpha \Big(\frac{N-1}{N} \kappa_2 + \frac{\kappa_1}{N}\Big) M:$$
#
# most are close to zero, while the largest grows with the width. The κ are sums over layers of
# $\tilde q^{\,l}\, \hat q^{\,l-1}$, the inner products of backpropagated signals and of activations, of a sample with itself
# (κ₁) and with another (κ₂), with
#
# $$q^l = \sigma_w^2\, \hat q^{\,l-1} + \sigma_b^2, \qquad \hat q^{\,l} = \mathbb E\, \varphi(u)\varphi(u'), \qquad
# \tilde q^{\,l} = \sigma_w^2\, \tilde q^{\,l+1}\, \mathbb E\, \varphi'(u)\varphi'(u'), \qquad (u, u') \sim N(0, q^l).$$
#
# Here: three layers of weights (α = 2), C = 10, N = 100, all widths equal.

# %% tags=["definitions"]
ACTIVATIONS = {  # module, φ, φ', variances of weights and biases
    "tanh": (nn.Tanh, np.tanh, lambda u: 1 - np.tanh(u) ** 2, 3.0, 0.64),
    "ReLU": (nn.ReLU, lambda u: u.clip(min=0), lambda u: (u > 0).astype(float), 2.0, 0.1),
    "linear": (nn.Identity, lambda u: u, np.ones_like, 1.0, 0.1),
}
NODES = np.linspace(-8, 8, 1600)
WEIGHTS = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()


def correlated(f, variance, covariance):
    """E f(u) f(u') for Gaussian u, u' of this variance and covariance, from 0 to the variance."""
    common = math.sqrt(covariance) * NODES[:, None]
    inner = f(common + math.sqrt(variance - covariance) * NODES) @ WEIGHTS
    return inner**2 @ WEIGHTS


def kappas(activation, num_layers):
    """κ₁ and κ₂ of a network whose layers 1 to L all have M inputs of unit variance: sums over layers of q̃ q̂."""
    _, phi, slope, weight_variance, bias_variance = ACTIVATIONS[activation]
    before, forward = [], [np.array([1.0, 0.0])]  # q and q̂: with itself, and with another sample
    for _ in range(num_layers - 1):
        before.append(weight_variance * forward[-1] + bias_variance)
        forward.append(np.array([correlated(phi, before[-1][0], q) for q in before[-1]]))
    backward = [np.ones(2)]  # q̃, from the output down
    for q in reversed(before):
        backward.append(weight_variance * backward[-1] * [correlated(slope, q[0], x) for x in q])
    return sum(d * h for d, h in zip(reversed(backward), forward, strict=True)) / (num_layers - 1)


def theory(activation, *, width, num_outputs, num_samples, num_layers=3):
    """Karakida, Akaho and Amari's mean, second moment and largest of the P eigenvalues, for large widths."""
    one, two = kappas(activation, num_layers)
    alpha, n = num_layers - 1, num_samples
    return {
        "mean": one * num_outputs / width,
        "second moment": alpha * ((n - 1) / n * two**2 + one**2 / n) * num_outputs,
        "largest": alpha * ((n - 1) / n * two + one / n) * width,
    }


def random_network(activation, *, width, num_outputs, num_samples, num_layers=3, seed=0):
    """The same of one random network, on Gaussian inputs: f with unit variance, one row an output."""
    module, _, _, weight_variance, bias_variance = ACTIVATIONS[activation]
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(num_layers):
        layer = nn.Linear(width, num_outputs if len(layers) == 2 * (num_layers - 1) else width)
        nn.init.normal_(layer.weight, std=math.sqrt(weight_variance / width), generator=generator)
        nn.init.normal_(layer.bias, std=math.sqrt(bias_variance), generator=generator)
        layers += [layer, module()]
    batch = torch.randn(num_samples, width, generator=generator), torch.zeros(num_samples, num_outputs)
    targets = ff.targets.all_classes()
    network, loss = nn.Sequential(*layers[:-1]), ff.losses.regression()
    full = ff.fisher_spectrum(network, batch, loss=loss, targets=targets, blocks=ff.whole, population=False).full
    return {
        "mean": full.eigenvalues.sum().item() / full.num_params,
        "second moment": full.eigenvalues.square().sum().item() / full.num_params,
        "largest": full.eigenvalues[0].item(),
        "mean of the C largest": full.eigenvalues[:num_outputs].mean().item(),
    }


# %%
WIDTHS, SEEDS, SIZE = (64, 128, 256, 512, 1024), range(3), {"num_outputs": 10, "num_samples": 100}
statistics = ("mean", "second moment", "largest")
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
print("measured over predicted, mean of 3 networks")
print(f"{'':8} {'M':>4} {'mean':>8} {'second moment':>14} {'largest':>8} {'mean of the C largest':>22}")
for color, activation in zip(("tab:blue", "tab:red", "tab:green"), ACTIVATIONS, strict=True):
    predicted = {width: theory(activation, width=width, **SIZE) for width in WIDTHS}
    for width in WIDTHS:
        networks = [random_network(activation, width=width, seed=seed, **SIZE) for seed in SEEDS]
        ratios = {
            name: np.mean([network[name] for network in networks]) / predicted[width][name] for name in statistics
        }
        leading = np.mean([network["mean of the C largest"] for network in networks]) / predicted[width]["largest"]
        print(
            f"{activation:8} {width:4} {ratios['mean']:8.3f} {ratios['second moment']:14.3f}",
            f"{ratios['largest']:8.3f} {leading:22.3f}",
        )
        for axis, name in zip(axes, statistics, strict=True):
            values = [network[name] for network in networks]
            axis.plot([width] * len(values), values, "o", ms=4, color=color, label=activation if width == 64 else None)
    for axis, name in zip(axes, statistics, strict=True):
        axis.plot(WIDTHS, [predicted[width][name] for width in WIDTHS], color=color, lw=1)
        axis.set(xlabel="width M", title=f"{name} eigenvalue" if name != "second moment" else "second moment")
        axis.set(xscale="log", yscale="log", xticks=WIDTHS, xticklabels=WIDTHS)
        axis.xaxis.minorticks_off()
        axis.grid(which="both")
axes[0].set(ylabel="of the true Fisher")
axes[0].legend(title="dots: networks; lines: theory");

# %% [markdown]
# **Agreement.** The scaling holds over a factor of 16 in width: the mean falls like 1/M, the second moment stays, the largest grows
# like M. At M = 1,024 the mean agrees within 0.5 %, the second moment within 11 %, the largest eigenvalue within 9 %.
#
# **Difference.** The two last approach the theory from above, slowly. In the limit the largest eigenvalue is C-fold,
# with one eigenvector an output; at finite width the gradients of different outputs are not quite orthogonal (their inner
# products are smaller by a factor of about √M, and there are C − 1 of them for each), which splits these C eigenvalues:
# the mean of the C largest is within 2.5 % at M = 1,024. For the same reason the second moment has a term of relative order C/M, which
# is largest for linear networks, where κ₂ is small against κ₁.

# %% [markdown]
# ## 5. One hidden layer, Gaussian data: linear against nonlinear
#
# **Claim** (Pennington and Worah 2018, in their abstract). Of a network with a single hidden layer and Gaussian data and weights, "linear networks
# suffer worse conditioning than nonlinear networks", and "nonlinear networks are generically non-degenerate".
#
# Their expression for the density is not quoted here: the text of the paper was not at hand, and a formula from memory is no reference. The
# claim is held against measurement first; then a law of the same limit is derived here, and held against it as well. The rows are those of the true Fisher of a regression, n inputs, n hidden
# units and n outputs, P = 2n² weights, and ten samples a unit, so that N C > P. Of a linear network $W_2 W_1 x$ the function has no more than
# n² parameters, and a change of basis of the hidden units changes nothing: half of the eigenvalues have to be zero.


# %%
def hidden_layer(activation, *, width, seed):
    """The eigenvalues of the true Fisher of W₂ φ(W₁ x), all P of them, in float64."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(width, width, bias=False), activation, nn.Linear(width, width, bias=False)
    ).double()
    for layer in (network[0], network[2]):
        nn.init.normal_(layer.weight, std=width**-0.5)
    batch = (torch.randn(10 * width, width, dtype=torch.float64), torch.zeros(10 * width, width, dtype=torch.float64))
    found = ff.fisher_spectrum(
        network, batch, loss=ff.losses.regression(), targets=ff.targets.all_classes(), blocks=ff.whole, population=False
    ).full
    return found.eigenvalues[: 2 * width**2], found.resolution


WIDTH = 10
figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
print(f"P = {2 * WIDTH**2}")
for name, activation in {"linear": nn.Identity(), "ReLU": nn.ReLU(), "tanh": nn.Tanh()}.items():
    spectra = [hidden_layer(activation, width=WIDTH, seed=seed) for seed in range(3)]
    for values, floor in spectra[:1]:
        axis.loglog(range(1, len(values) + 1), values.clamp(min=floor), label=name)
    ranks = [int((values > floor).sum()) for values, floor in spectra]
    conditions = [(values[0] / values[values > floor].min()).item() for values, floor in spectra]
    print(f"{name:8} resolved: {ranks}   λ_max over the smallest resolved: {[f'{c:.0f}' for c in conditions]}")
axis.set(xlabel="rank $k$", ylabel="eigenvalue $\\lambda_k$, or the resolution where below")
axis.legend();

# %% [markdown]
# **Agreement.** Of the linear network exactly half of the eigenvalues are zero, in each of three networks; with tanh none is.
#
# **Difference.** With ReLU one eigenvalue a hidden unit is zero, as a unit's weights can be scaled up before it and down behind it: "generically" has to be
# read without such functions. And among eigenvalues that are not zero the linear network is no worse conditioned at this width than the one with tanh, whose
# smallest ones are those that would be zero if it were linear. The authors' statement is of infinite width.
#
# ### A law of that limit, derived here
#
# Not theirs, and not compared with theirs. With $h = W_1 x$, entries of variance 1/n in both weights and many samples, the blocks of the Fisher of
# $W_2\,\varphi(h)$ are $\mathbb E\,\varphi(h)\varphi(h)^\top \otimes I$ for $W_2$, entries
# $(W_2^\top W_2)_{ii'}\, \mathbb E\,\varphi'(h_i)\varphi'(h_{i'})\, x_j x_{j'}$ for $W_1$, and between them $W_{2,ci}\, \mathbb E\,\varphi'(h_i)\varphi(h_{i'})\, x_j$.
# Inputs of two hidden units have correlations of order $1/\sqrt n$. In powers of these, by Stein's lemma, with
#
# $$\eta = \operatorname{Var} \varphi(u), \qquad \eta' = \mathbb E\,\varphi'(u)^2, \qquad \zeta = (\mathbb E\,\varphi'(u))^2, \qquad u \sim N(0, 1),$$
#
# and but for parts whose rank is of order n, of 2n², or whose size vanishes,
#
# $$F \simeq \begin{pmatrix} \zeta\, W_2^\top W_2 \otimes I + (\eta' - \zeta) I & \zeta\, W_2^\top \otimes W_1^\top \\
# \zeta\, W_2 \otimes W_1 & \zeta\, I \otimes W_1 W_1^\top + (\eta - \zeta) I \end{pmatrix}.$$
#
# The singular vectors of the two weights divide this into blocks of two by two: the eigenvalues are those of
#
# $$\begin{pmatrix} \zeta a + \eta' - \zeta & \zeta \sqrt{ab} \\ \zeta \sqrt{ab} & \zeta b + \eta - \zeta \end{pmatrix},$$
#
# where a and b are independent and follow the Marchenko-Pastur law of ratio 1. The mean is $(\eta + \eta')/2$, the mean square
# $(\eta^2 + \eta'^2 + 4\zeta^2)/2$. A linear network has η = η' = ζ: half of the eigenvalues are zero, the others a + b. Any other function has η > ζ and
# η' > ζ, as the variances of what is not linear in φ and of φ' are positive, and no eigenvalue of the law is smaller than the smaller difference.


# %% tags=["definitions"]
def hidden_layer_law(activation, *, points=400):
    """Eigenvalues of one hidden layer in the limit: those of 2 × 2 blocks for `points`² pairs of quantiles, sorted."""
    _, phi, slope, _, _ = ACTIVATIONS[activation]
    eta = phi(NODES) ** 2 @ WEIGHTS - (phi(NODES) @ WEIGHTS) ** 2
    eta_slope, zeta = slope(NODES) ** 2 @ WEIGHTS, (slope(NODES) @ WEIGHTS) ** 2
    angle = np.linspace(0, math.pi / 2, 20_001)  # singular values 2 sin t of a square matrix follow a quarter circle
    law = (2 * angle + np.sin(2 * angle)) / math.pi
    a = 4 * np.sin(np.interp((np.arange(points) + 0.5) / points, law, angle)) ** 2
    first, second = zeta * a[:, None] + eta_slope - zeta, zeta * a + eta - zeta
    middle, root = (first + second) / 2, np.sqrt((first - second) ** 2 / 4 + zeta**2 * a[:, None] * a)
    return np.sort(np.concatenate([middle - root, middle + root], axis=None))


def hidden_layer_fisher(activation, *, width, num_samples=4000, seed=0):
    """The true Fisher (P, P) of W₂ φ(W₁ x), by P products of the operator with unit vectors."""
    torch.manual_seed(seed)
    first, second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=width**-0.5)
    fn = ff.functionalize(nn.Sequential(first, ACTIVATIONS[activation][0](), second).double())
    batch = torch.randn(num_samples, width).double(), torch.zeros(num_samples, width).double()
    loss, targets = ff.losses.regression(), ff.targets.all_classes()
    operator = ff.operators.fisher(fn, fn.params, batch, loss, targets=targets).to_scipy("parameter")
    return operator @ np.eye(operator.shape[0])


def distance_to_hidden_layer_law(eigenvalues, law):
    """The largest difference of the two distribution functions; equal values, up to round-off, are one step."""
    eigenvalues, law = (np.sort(values.round(9)) for values in (eigenvalues, law))
    return max(
        np.abs(
            np.searchsorted(eigenvalues, at, side) / len(eigenvalues) - np.searchsorted(law, at, side) / len(law)
        ).max()
        for at in (eigenvalues, law)
        for side in ("left", "right")
    )


# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
print(f"{'':8} {'n':>3} {'mean':>7} {'law':>6} {'mean square':>13} {'law':>6} {'distance to the law':>21}")
for axis, activation in zip(axes, ("linear", "ReLU", "tanh"), strict=True):
    law = hidden_layer_law(activation)
    for width, color in ((8, "tab:orange"), (20, "tab:blue")):
        values = np.linalg.eigvalsh(hidden_layer_fisher(activation, width=width))
        print(
            f"{activation:8} {width:3} {values.mean():7.3f} {law.mean():6.3f} {np.mean(values**2):13.3f}",
            f"{np.mean(law**2):6.3f} {distance_to_hidden_layer_law(values, law):21.3f}",
        )
        axis.step(values, (np.arange(len(values)) + 1) / len(values), color=color, lw=1, label=f"measured, n = {width}")
    axis.plot(law, (np.arange(len(law)) + 1) / len(law), color="black", lw=1, ls="--", label="the law")
    axis.set(title=activation, xlabel="eigenvalue λ", xlim=(-0.03 * law.max(), 1.5 * law.max()))
axes[0].set(ylabel="share of eigenvalues up to λ")
axes[0].legend(loc="lower right");

# %% [markdown]
# **Agreement.** The distribution functions come closer to the law as the network widens: from n = 8 to 20 their largest difference falls from 0.11 to 0.03
# (linear), from 0.31 to 0.16 (ReLU) and from 0.28 to 0.11 (tanh). The nonlinear networks have no atom at zero where the linear one has half of its eigenvalues.
#
# **Difference.** At these widths the mean still depends on the draw of the weights: it is off by 31 and 7 % (linear, n = 8 and 20) and by 21 and 4 % (tanh). With
# ReLU the mean of φ makes n eigenvalues, one an output, that grow with n and lie beyond the law and the figure: their share is 1/(2n), but they count in mean
# and mean square (0.54 and 0.82, the law 0.42 and 0.31). The smallest eigenvalues lie below the law's lower edge, as correlations of order $1/\sqrt n$ are not
# small yet.
#
# ## What was found
#
# All five claims are met in what they say of shape and scaling: the edges of the noise, as many outliers as classes, the empirical Fisher that is
# the true one only at the minimum of the right model, the scaling with width to within some per cent, the degeneracy of linear networks, for
# whose limit, and that of nonlinear ones, a law was derived and met. Where figures
# differ, it is by terms of finite size, which have their place and size at the end of each section, or by a word that the claim leaves open.
