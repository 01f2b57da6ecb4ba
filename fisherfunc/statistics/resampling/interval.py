"""Confidence intervals of metrics, as records of plain values, and how replicates make one.

All intervals here are of the population that the *sequences* were drawn from, as more of them would show it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.metrics import SUMMARY, trace
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.statistics.resampling.ranges import NO_INTERVAL, is_of_the_sample, range_of, why_not_these
from fisherfunc.statistics.resampling.replicates import Replicate, Replicates

Metric = Callable[[Spectrum], Tensor]
"""A spectrum, or a stack of spectra → a number each."""
OUTSIDE = "the interval is around the estimate less its bias, and does not hold the estimate itself"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of one metric, or, where there is no honest one, all that it can be, and the reason.

    Attributes:
        estimate: The metric of the sample; None where it does not exist.
        low: The lower end, within the range of the metric; where there is no interval (`known` is False), the least
            value that the metric can have, not to be printed as an end. In JSON, None is in its place.
        high: The upper end; where there is no interval, the largest value that the metric can have, or infinity.
        standard_error: The standard deviation that the metric has from sample to sample.
        bias: By how much the estimate is too large, as estimated; the interval is around estimate − bias.
        level: The nominal coverage.
        method: How it was made.
        num_sequences: How many sequences it rests on.
        note: Why there is no interval, or why the estimate is not in it; None where neither is so.
    """

    estimate: float | None
    low: float
    high: float
    standard_error: float | None
    bias: float | None
    level: float
    method: str
    num_sequences: int
    note: str | None = None

    @property
    def known(self) -> bool:
        """Whether there is an interval, so that its ends may be printed."""
        return self.note in (None, OUTSIDE)

    @property
    def corrected(self) -> float | None:
        """The estimate less its bias."""
        return None if self.estimate is None or self.bias is None else self.estimate - self.bias

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON; the ends are None where there is no interval."""
        return asdict(self) | ({} if self.known else {"low": None, "high": None})


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """The intervals of every metric of a partition.

    Attributes:
        blocks: {label: {metric: interval}}.
        block_diagonal: {metric: interval} of the block-diagonal matrix.
        full: {metric: interval} of the full matrix.
    """

    blocks: Mapping[str, Mapping[str, Interval]]
    block_diagonal: Mapping[str, Interval]
    full: Mapping[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, laid out as in `FisherSpectrum.to_dict`."""
        return {
            "per_block": {label: _plain(found) for label, found in self.blocks.items()},
            "global": _plain(self.block_diagonal),
            "full": _plain(self.full),
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Intervals":
        """What `to_dict` was called on."""
        return Intervals(
            blocks={label: _read(found) for label, found in content["per_block"].items()},
            block_diagonal=_read(content["global"]),
            full=_read(content["full"]),
        )


def _plain(found: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.to_dict() for name, interval in found.items()}


def _read(found: Mapping[str, Any]) -> dict[str, Interval]:
    return {name: Interval(**_with_ends(name, entries)) for name, entries in found.items()}


def _with_ends(name: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    if entries["low"] is not None:
        return dict(entries)
    low, high = _no_interval(SUMMARY.get(name), entries["estimate"])
    return {"note": "no interval in the file", **entries, "low": low, "high": high}


def _no_interval(metric: Metric | None, estimate: float | None) -> tuple[float, float]:
    """All that a metric can be: the ends where there is no interval."""
    low, high = range_of(metric)
    return (low if estimate is None else min(low, estimate)), high


Ends = Callable[[Float[Tensor, ""], Float[Tensor, " r"]], tuple[Tensor, Tensor, Tensor]]
"""The metric of the sample, and of replicates → its corrected estimate, and the ends of its interval."""
Spread = Callable[[Float[Tensor, " r"]], Tensor]
"""The metric of replicates → its standard error."""


def intervals_of(
    replicates: Replicates,
    metrics: Mapping[str, Metric],
    *,
    ends: Ends,
    spread: Spread,
    facts: Mapping[str, Any],
) -> Intervals:
    """The intervals of the trace and of the user's own functions, and why there is none of other metrics.

    Where a number is positive in the sample and in all replicates, the interval is one of its logarithm: errors of
    spectra are ratios, and such an interval does not reach below zero.

    Args:
        replicates: The sample and its replicates.
        metrics: {name: metric}.
        ends: How replicates make an interval.
        spread: How they make a standard error.
        facts: The fields of `Interval` that all have in common.
    """

    def none(metric: Metric, value: float, reason: str) -> Interval:
        low, high = _no_interval(metric, _finite(value))
        return Interval(
            estimate=_finite(value), low=low, high=high, standard_error=None, bias=None, note=reason, **facts
        )

    def interval(values: Float[Tensor, " r"], metric: Metric) -> Interval:
        value = values[0].item()
        if math.isfinite(value) and bool((values == values[0]).all()):  # the logarithm's round-off would be all of it
            return Interval(estimate=value, low=value, high=value, standard_error=0.0, bias=0.0, **facts)
        on_log_scale = bool((values > 0).all())
        scaled = values.log() if on_log_scale else values
        center, low, high = (float(end.exp() if on_log_scale else end) for end in ends(scaled[0], scaled[1:]))
        least, most = range_of(metric)
        limits = min(least, value), max(most, value)
        reason = why_not_these((center, low, high), limits)
        if reason is not None:
            return none(metric, value, reason)
        low, high, error = max(low, limits[0]), min(high, limits[1]), float(spread(values[1:]))
        return Interval(
            estimate=value,
            low=low,
            high=high,
            standard_error=error if math.isfinite(error) else None,
            bias=value - center,
            note=None if low <= value <= high else OUTSIDE,
            **facts,
        )

    def of(matrix: Replicate) -> dict[str, Interval]:
        found = {}
        for name, metric in metrics.items():
            if is_of_the_sample(metric):
                found[name] = none(metric, float(metric(matrix.sample)), NO_INTERVAL)
            elif metric is trace and matrix.heavy is not None:
                found[name] = none(metric, matrix.traces[0].item(), matrix.heavy)
            else:
                values = matrix.traces if metric is trace else metric(matrix.spectra).double()
                found[name] = interval(values, metric)
        return found

    return Intervals(
        blocks={label: of(matrix) for label, matrix in replicates.blocks.items()},
        block_diagonal=of(replicates.block_diagonal),
        full=of(replicates.full),
    )


def around(center: Tensor, error: Tensor, *, level: float, num_sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """The center, and center ± t · error, t of Student's distribution with `num_sequences` − 1 degrees of freedom.

    Args:
        center: The corrected estimate.
        error: Its standard error.
        level: The nominal coverage.
        num_sequences: How many sequences both rest on.
    """
    reach = student_quantile((1 + level) / 2, num_sequences - 1) * error
    return center, center - reach, center + reach


def student_quantile(probability: float, degrees: int) -> float:
    """The t with P(T ≤ t) = `probability`, T of Student's distribution.

    Example:
        >>> round(student_quantile(0.975, 9), 4), round(student_quantile(0.05, 1), 4)
        (2.2622, -6.3138)
    """
    from scipy.special import stdtrit  # takes 0.3 s to import, and is of no use before

    return float(stdtrit(degrees, probability))


def check_options(level: float, **counts: tuple[int, int]) -> None:
    """Check what both methods take.

    Args:
        level: Between 0 and 1.
        **counts: A number, and the least that it may be.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level expected a number between 0 and 1, got level={level!r}; 0.95 is usual")
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} expected at least {least}, got {name}={value!r}")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
