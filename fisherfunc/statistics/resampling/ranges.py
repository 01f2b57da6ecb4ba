"""In what range each metric lies, and of which of them resampling sequences gives no interval, and why.

| metric | range |
| --- | --- |
| eigenvalues, trace, gap | from 0; the gap is at most λ_max |
| relative gap | from 0 to 1 |
| condition number | from 1 |
| effective and stable rank, participation ratio | from 1 to P |
| numerical rank | from 0 to P |

The trace is a mean over sequences. All others are of the spectrum of these rows, which is not that of the
population, and no resampling of rows tells how far off they are (El Karoui and Purdom, arXiv 1608.00948):
docs/population.md has how often such intervals hold, down to none of a hundred, and what holds in their place.
"""

import math
from collections.abc import Iterable

from fisherfunc.linalg import metrics

_RANKS = (metrics.effective_rank, metrics.participation_ratio, metrics.stable_rank)
_FROM_ZERO = (metrics.largest, metrics.second, metrics.smallest, metrics.gap, metrics.trace)
NO_INTERVAL = (
    "resampling does not show how far this is from that of the population; ff.population has what holds of that"
)
"""Why there is no interval of a metric of the sample."""


def range_of(metric: object, num_params: int | None = None) -> tuple[float, float]:
    """The least and the largest value that a metric of a matrix of P parameters can have; of a user's function, any."""
    most = math.inf if num_params is None else float(num_params)
    if metric is metrics.relative_gap:
        return 0.0, 1.0
    if metric is metrics.condition_number:
        return 1.0, math.inf
    if metric in _RANKS or metric is metrics.numerical_rank:
        return (1.0 if metric in _RANKS else 0.0), most
    return (0.0 if metric in _FROM_ZERO else -math.inf), math.inf


def is_of_the_sample(metric: object) -> bool:
    """Whether a metric is one of `ff.metrics` that is of the spectrum of these rows: all but the trace."""
    return metric in metrics.SUMMARY.values() and metric is not metrics.trace


def has_own(chosen: Iterable[object]) -> bool:
    """Whether one of them is a function of the user's own."""
    return any(metric not in metrics.SUMMARY.values() for metric in chosen)


def why_not_these(ends: tuple[float, float, float], limits: tuple[float, float]) -> str | None:
    """Why an interval is none; None where it is one.

    Args:
        ends: The corrected estimate, the lower and the upper end.
        limits: The range of the metric.
    """
    center, low, high = ends
    if not all(map(math.isfinite, (center, low, high))):
        return "the metric does not exist in the sample or in a replicate"
    least, most = limits
    if not (least <= center <= most and low <= most and high >= least):
        return "the bias that was found takes the estimate out of its range: there are too few sequences to correct it"
    return None
