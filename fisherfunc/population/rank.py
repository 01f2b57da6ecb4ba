"""The effective rank of the population, exp(entropy of λ/Σλ), as far as the data bound it: two linear programmes.

The entropy needs eigenvalues that N tokens do not show. With m_i the share of the trace that lies at x_i = λ/tr F, on a
grid of x, the entropy and the data are linear in m:

    log rank = Σ m_i log(1/x_i),   Σ m_i = 1,   Σ m_i/x_i ≤ P
    Σ m_i/(x_i + κ/tr F) = d(κ),   Σ m_i x_i = ‖F‖²/(tr F)²,   Σ m_i x_i² = tr F³/(tr F)³

the second line within intervals. The smallest and the largest value are what a spectrum can have that agrees with
them. A grid's bounds are inner ones, so that it is refined, and reaches lower, until both move by less than 1 %.
Source: El Karoui, "Spectrum estimation for large dimensional covariance matrices", Ann. Statist. 36, 2008 (the
programme, with other data). Axis order: grid `(i,)`, points of the curve `(k,)`, clusters `(s,)`.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.population.clusters import ClusterLabels, clusters_of
from fisherfunc.population.dimension import Curve, dimension_of, slope_of
from fisherfunc.population.estimate import Estimate, check_level, half_width, jackknifed
from fisherfunc.population.moments import Moments, moments_of

METHOD = "linear programmes over spectra that agree with trace, moments and effective dimensions"
NARROW = 1.5
"""How far apart the ends may be, as a factor, to say something. A point between them, their geometric mean, was 9 to
22 % too high by simulation (spiked spectra, 20 sequences), so that there is none."""
PER_DECADE, ROUNDS = 15, 5
MOVED = 0.01
NUM_DIMENSIONS = 10
LARGEST = 0.2
"""Of p₂/p₁, which λ₁ is at least: up to which κ dimensions are data. From there on d is what the trace and the moments
say, and errors of d and of the trace cancel, to less than the curve is right to: by simulation (λ = 1/k², 20 clusters)
the intervals of d over the trace missed in 2 % at 0.05 λ₁, in 14 and 31 % at 0.3 and 1.7 λ₁."""
KINDS = 3
"""Of data: dimensions, which move together, and two moments; their levels are those of Bonferroni."""


def rank_estimate(
    curve: Curve | None, found: Moments, fold_traces: Float[Tensor, " f"], *, num_params: int, level: float
) -> Estimate:
    """Return the bounds of the effective rank.

    Args:
        curve: The effective dimension over κ; None of a zero Gram.
        found: The moments.
        fold_traces: tr F without each of the clusters that the curve leaves out.
        num_params: P.
        level: The nominal coverage.
    """
    each = 1 - (1 - level) / KINDS  # all of the data at once have to hold
    purity = _over_trace(found, 0, each)
    least = 1 / purity.high if purity.high > 0 else 1.0  # the participation ratio, of a higher order than the entropy
    whole = min(least, float(num_params)), float(num_params)

    def estimate(ends: tuple[float, float], warning: str | None) -> Estimate:
        return Estimate(
            estimate=None,
            low=ends[0],
            high=ends[1],
            level=level,
            num_clusters=len(found.sizes),
            method=METHOD,
            warning=warning,
        )

    if curve is None:
        return estimate(whole, "the trace is zero: there is no effective rank")
    powers = [(k + 1, _over_trace(found, k, each)) for k in range(min(2, len(found.values)))]
    powers = [(k, entry) for k, entry in powers if entry.high > 0]  # one of zero is of a sample that shows none of it
    largest = LARGEST * float(found.values[0]) / (float(found.traces.sum()) / float(found.sizes.sum()))
    ends = _refined(_dimensions(curve, fold_traces, each, largest), powers, num_params)
    if ends is None:
        return estimate(whole, "no spectrum agrees with all intervals of the data at once")
    ends = max(ends[0], whole[0]), max(min(ends[1], whole[1]), whole[0])
    return estimate(ends, None if ends[1] <= NARROW * ends[0] else f"open by a factor of {ends[1] / ends[0]:.2g}")


def _over_trace(found: Moments, k: int, level: float) -> Estimate:
    """p_{k+2}/(tr F)^{k+2}: the moment of order k + 1 of the shares; at most one."""
    traces, sizes = found.traces, found.sizes
    power = k + 2
    left_out = ((traces.sum() - traces) / (sizes.sum() - sizes)) ** power
    return jackknifed(
        found.values[k] / (traces.sum() / sizes.sum()) ** power,
        found.left_out[k] / left_out,
        level=level,
        limits=(0.0, 1.0),
        method="",
    )


def _dimensions(
    curve: Curve, fold_traces: Float[Tensor, " f"], level: float, largest: float
) -> list[tuple[float, float, float]]:
    """Where κ/tr F is, up to the largest κ, and what d is there at least and at most, as the trace has an error too."""
    logs = fold_traces.log()
    trace, shift = float(logs.mean().exp()), logs - logs.mean()
    slopes = slope_of(curve.kappa.log(), curve.dimension.log())
    count = max(1, int((curve.kappa <= largest).sum()))
    chosen = sorted({round(k * (count - 1) / (NUM_DIMENSIONS - 1)) for k in range(NUM_DIMENSIONS)})
    found = []
    for k in chosen:
        moved = curve.deviations[k] + slopes[k] * shift
        if not bool(moved.isfinite().all()):  # one sequence has all of the gradient
            continue
        width, dimension = math.exp(half_width(moved, level)), float(curve.dimension[k])
        found.append((float(curve.kappa[k]) / trace, dimension / width, dimension * width))
    return found


def _refined(
    dimensions: list[tuple[float, float, float]], powers: list[tuple[int, Estimate]], num_params: int
) -> tuple[float, float] | None:
    """The bounds, on grids of the shares that are refined until they hold."""
    top = min([1.0, *(entry.high ** (1 / (power + 1)) for power, entry in powers)])
    bottom, before = min(0.1 / num_params, 0.1 * top), None
    for refinement in range(ROUNDS):
        count = math.ceil(PER_DECADE * 2**refinement * math.log10(top / bottom))
        grid = torch.logspace(math.log10(bottom), math.log10(top), count, dtype=torch.float64, device="cpu")
        grid = torch.cat([grid, grid.new_tensor([1 / num_params])])  # where P equal eigenvalues lie
        found = _bounds(grid, dimensions, powers, num_params)
        if before is not None and (
            found is None or all(abs(math.log(new / old)) < MOVED for new, old in zip(found, before, strict=True))
        ):
            return found
        before, bottom = found, bottom / 3
    return before


def _bounds(
    grid: Float[Tensor, " i"],
    dimensions: list[tuple[float, float, float]],
    powers: list[tuple[int, Estimate]],
    num_params: int,
) -> tuple[float, float] | None:
    """Both programmes on one grid; None where no spectrum on it agrees with the data."""
    from scipy.optimize import linprog

    rows = [1 / (grid + kappa) for kappa, _, _ in dimensions] + [grid**power for power, _ in powers]
    limits = [(low, high) for _, low, high in dimensions] + [(entry.low, entry.high) for _, entry in powers]
    above, bounds = [1 / grid / num_params], [1.0]
    for row, (low, high) in zip(rows, limits, strict=True):  # each about one: solvers have absolute tolerances
        above, bounds = [*above, row / high], [*bounds, 1.0]
        if low > 0:
            above, bounds = [*above, -row / low], [*bounds, -1.0]
    entropy = -grid.log()
    ends = []
    for sign in (1, -1):
        solved: Any = linprog(
            (sign * entropy).numpy(),
            A_ub=torch.stack(above).numpy(),
            b_ub=bounds,
            A_eq=torch.ones(1, len(grid), dtype=torch.float64, device="cpu").numpy(),
            b_eq=[1.0],
            bounds=(0, None),
            method="highs",
        )
        if solved.status != 0:
            return None
        ends.append(math.exp(sign * solved.fun))
    return ends[0], ends[1]


def effective_rank(grams: TokenGrams, *, clusters: ClusterLabels = None, level: float = 0.95) -> Estimate:
    """Return what the effective rank of the population lies between; with a warning where that is more than 1.5 apart.

    The sample's own is below N, whatever that of the population is. Where eigenvalues below what the tokens resolve
    carry much of the trace, the bounds are orders of magnitude apart: that is what is known.
    Cost as `effective_dimension`, and some dozen linear programmes of a few hundred unknowns, under a second.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage.

    Raises:
        ValueError: If there are fewer than three clusters, or the Grams are centred or of sampled coordinates.
    """
    check_level(level)
    found = clusters_of(grams, clusters, "the effective rank")
    gram = grams.block().double()
    curve, _ = dimension_of(grams, gram, torch.linalg.eigh(gram), found, None, level)
    folds = found.folds()
    return rank_estimate(
        curve,
        moments_of(gram, found),
        left_out_traces(folds.sums(gram.diagonal()), folds.sizes),
        num_params=sum(grams.num_params.values()),
        level=level,
    )


def left_out_traces(traces: Float[Tensor, " s"], sizes: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
    """Return tr F without each cluster."""
    return (traces.sum() - traces) / (sizes.sum() - sizes)
