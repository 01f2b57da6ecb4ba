"""In what range each metric lies, and where replicates do not show how sure one is: there it has a reason instead.

| metric | range |
| --- | --- |
| eigenvalues, trace, gap | from 0; the gap is at most λ_max |
| relative gap | from 0 to 1 |
| condition number | from 1 |
| effective and stable rank, participation ratio | from 1 to P |
| numerical rank | from 0 to P |
"""

import math

from fisherfunc.linalg import metrics
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.statistics.sample_limits import NEAR

_GAPS = (metrics.gap, metrics.relative_gap)
_BY_COUNT = (metrics.numerical_rank, metrics.smallest, metrics.condition_number)
_BY_SPREAD = (metrics.effective_rank, metrics.participation_ratio)
_RANKS = (metrics.effective_rank, metrics.participation_ratio, metrics.stable_rank)
_FROM_ZERO = (metrics.largest, metrics.second, metrics.smallest, metrics.gap, metrics.trace)


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


def has_log_scale(metric: object) -> bool:
    """Whether errors are ratios: not of gaps, which come near zero where two eigenvalues meet."""
    return metric not in _GAPS


def why_none(metric: object, stack: Spectrum) -> str | None:
    """Why replicates do not show how sure a metric is; None where they do.

    Args:
        metric: Of `ff.metrics`, or the user's own.
        stack: The sample, and its replicates.
    """
    if metric in _BY_COUNT and len(metrics.numerical_rank(stack).unique()) > 1:
        return "the numerical rank, which it rests on, differs between replicates: it jumps, and does not vary"
    if metric in _BY_SPREAD and _is_set_by_rows(stack):
        return "the number of rows sets it: the effective rank is above a third of what they allow"
    return None


def why_not_these(
    metric: object, ends: tuple[float, float, float], error: float, limits: tuple[float, float]
) -> str | None:
    """Why an interval is none; None where it is one.

    Args:
        metric: What it is of.
        ends: The corrected estimate, the lower and the upper end.
        error: The standard error.
        limits: The range of the metric.
    """
    center, low, high = ends
    if not all(map(math.isfinite, (center, low, high))):
        return "the metric does not exist in the sample or in a replicate"
    if metric in _GAPS and min(low, center - 2 * error) <= 0:  # the least quantile of replicates never is
        return "not told from zero by these sequences: where eigenvalues meet, replicates do not show how sure a gap is"
    least, most = limits
    if not (least <= center <= most and low <= most and high >= least):
        return "the bias that was found takes the estimate out of its range: there are too few sequences to correct it"
    return None


def _is_set_by_rows(stack: Spectrum) -> bool:
    """As `sample_limits` has it, also of a union of blocks: then of all their eigenvalues."""
    count = stack.eigenvalues.shape[-1]
    fewer = stack.num_params is None or count < stack.num_params
    return fewer and float(metrics.effective_rank(stack)[0]) > NEAR * count
