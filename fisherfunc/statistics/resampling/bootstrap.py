"""Bootstrap of sequences: how sure the trace is, or a function of one's own, from the Grams alone."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.statistics.block_grams import BlockRule, gathered, several_sequences
from fisherfunc.statistics.resampling.interval import Ends, Intervals, Metric, around, check_options, intervals_of
from fisherfunc.statistics.resampling.ranges import has_own
from fisherfunc.statistics.resampling.replicates import replicates_of

METHODS = ("normal", "basic", "percentile")


def bootstrap(
    grams: TokenGrams,
    *,
    blocks: BlockRule = None,
    metrics: Mapping[str, Metric] = MappingProxyType(SUMMARY),
    num_replicates: int = 200,
    level: float = 0.95,
    method: str = "normal",
    seed: int = 0,
) -> Intervals:
    """Confidence intervals by resampling sequences, which keeps the dependence of the tokens of each.

    A replicate draws S of the S sequences with replacement: with m_s the times that sequence s is drawn, its matrix is
    F* = (1/N*) Σ_n m_{s(n)} g_n g_nᵀ, N* = Σ_s m_s T_s. The same draws serve all blocks. With x the metric, or its
    logarithm where it is always positive, and x̄* and sd* the mean and the standard deviation over replicates:

        normal      x − (x̄* − x) ± t_{S−1} √(S/(S−1)) sd*: what the replicates have too much is taken off
        basic       from 2x − the upper quantile of x* to 2x − the lower
        percentile  from the lower to the upper quantile of x*: for comparison

    There are intervals of the trace, and of the user's own functions, whose coverage is theirs to find out
    (`ff.testing.coverage`). Of the other metrics there is none, and its note says why: they are of the spectrum of
    these rows, of which resampling does not show how far it is from that of the population (docs/population.md); what
    holds of the population is in `ff.population`.

    Cost nothing for the trace; for functions of one's own `num_replicates` float64 eigensolves of about 0.63 N rows for
    each block and for the full matrix.
    Source: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, chapters 2 and 5.

    Args:
        grams: The Grams of a pass; of centred ones each replicate has its own mean subtracted.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by, or `by_layer`.
        metrics: {name: function of a `Spectrum`}, such as `ff.metrics.effective_rank`; else all of `ff.metrics`.
        num_replicates: How often the sequences are drawn.
        level: The nominal coverage.
        method: "normal", "basic" or "percentile".
        seed: Of the draws.

    Returns:
        An `Interval` for each metric of each block, of the block-diagonal and of the full matrix; one without ends has
        a `note` that says why.

    Raises:
        ValueError: If there is one sequence only, or an option is out of range.

    Example:
        >>> import fisherfunc as ff
        >>> samples = (torch.randn(30, 4), torch.arange(30) % 3)
        >>> fn = ff.functionalize(torch.nn.Linear(4, 3))
        >>> found = bootstrap(ff.token_grams(fn, fn.params, samples, ff.losses.classification()))
        >>> found.full["trace"].low < found.full["trace"].estimate < found.full["trace"].high
        True
    """
    check_options(level, num_replicates=(num_replicates, 2))
    if method not in METHODS:
        raise ValueError(f"method expected one of {METHODS}, got method={method!r}")
    sequences = several_sequences(grams, "a bootstrap")
    count = sequences.num_sequences
    inflation = math.sqrt(count / (count - 1))
    weights = draws(count, num_replicates, seed=seed)
    return intervals_of(
        replicates_of(grams, gathered(grams, blocks), sequences, weights, solve=has_own(metrics.values())),
        metrics,
        ends=_ends(method, level, count),
        spread=lambda replicates: inflation * replicates.std(),
        facts={"level": level, "method": f"bootstrap, {method}, {num_replicates} replicates", "num_sequences": count},
    )


def draws(num_sequences: int, num_replicates: int, *, seed: int) -> Float[Tensor, "r s"]:
    """How often each replicate draws each sequence.

    Args:
        num_sequences: S, how many there are, and how many each replicate draws.
        num_replicates: How many replicates.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_sequences, (num_replicates, num_sequences), generator=generator, device="cpu")
    counts = torch.zeros(num_replicates, num_sequences, dtype=torch.float64, device="cpu")
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _ends(method: str, level: float, num_sequences: int) -> Ends:
    inflation = math.sqrt(num_sequences / (num_sequences - 1))  # S draws vary as if divided by S, not by S − 1
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device="cpu")

    def ends(sample: Tensor, replicates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        center = 2 * sample - replicates.mean()
        if method == "normal":
            return around(center, inflation * replicates.std(), level=level, num_sequences=num_sequences)
        low, high = replicates.quantile(tails.to(replicates.device))
        return (center, low, high) if method == "percentile" else (center, 2 * sample - high, 2 * sample - low)

    return ends
