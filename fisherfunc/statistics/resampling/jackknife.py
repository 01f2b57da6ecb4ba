"""Jackknife over sequences: standard errors, and estimates with the bias of first order taken off."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.statistics.block_grams import BlockRule, gathered, several_sequences
from fisherfunc.statistics.resampling.interval import Intervals, Metric, around, check_options, intervals_of
from fisherfunc.statistics.resampling.ranges import has_own
from fisherfunc.statistics.resampling.replicates import replicates_of


def jackknife(
    grams: TokenGrams,
    *,
    blocks: BlockRule = None,
    metrics: Mapping[str, Metric] = MappingProxyType(SUMMARY),
    level: float = 0.95,
) -> Intervals:
    """Confidence intervals by leaving out one sequence at a time: no draws, and cheap where sequences are few.

    With x the metric, or its logarithm where it is always positive, x_s that without sequence s, and x̄ their mean:

        corrected  S x − (S−1) x̄;    standard error  √((S−1)/S Σ_s (x_s − x̄)²);    interval  corrected ± t_{S−1} · error

    The correction takes off a bias that falls like 1/S. There are intervals of the trace, and of the user's own
    functions; of the other metrics there is none, and its note says why (see `bootstrap`).

    Cost nothing for the trace; for functions of one's own S float64 eigensolves of N − T rows for each block and for
    the full matrix: where sequences are many, as where each is one sample, `bootstrap` costs less.
    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 10 and 11.

    Args:
        grams: The Grams of a pass; of centred ones each replicate has its own mean subtracted.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by, or `by_layer`.
        metrics: {name: function of a `Spectrum`}, such as `ff.metrics.effective_rank`; else all of `ff.metrics`.
        level: The nominal coverage.

    Returns:
        An `Interval` for each metric of each block, of the block-diagonal and of the full matrix; one without ends has
        a `note` that says why.

    Raises:
        ValueError: If there is one sequence only, or an option is out of range.
    """
    check_options(level)
    sequences = several_sequences(grams, "a jackknife")
    count = sequences.num_sequences

    def spread(replicates: Tensor) -> Tensor:
        return ((count - 1) / count * (replicates - replicates.mean()).square().sum()).sqrt()

    def ends(sample: Tensor, replicates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        center = count * sample - (count - 1) * replicates.mean()
        return around(center, spread(replicates), level=level, num_sequences=count)

    left_out = 1 - torch.eye(count, dtype=torch.float64, device="cpu")
    return intervals_of(
        replicates_of(grams, gathered(grams, blocks), sequences, left_out, solve=has_own(metrics.values())),
        metrics,
        ends=ends,
        spread=spread,
        facts={"level": level, "method": "jackknife", "num_sequences": count},
    )
