"""Confidence intervals of metrics, as records of plain values, and how replicates make one.

All intervals here are of the population that the *sequences* were drawn from, as more of them would show it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.statistics.quantiles import student_quantile

Metric = Callable[[Spectrum], Tensor]
"""A spectrum, or a stack of spectra → a number each."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of one metric; None where the metric does not exist in the sample or in a replicate.

    Attributes:
        estimate: The metric of the sample.
        low: The lower end.
        high: The upper end.
        standard_error: The standard deviation that the metric has from sample to sample.
        bias: By how much the estimate is too large, as estimated; the interval is around estimate − bias.
        level: The nominal coverage.
        method: How it was made.
        num_sequences: How many sequences it rests on.
    """

    estimate: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    bias: float | None
    level: float
    method: str
    num_sequences: int

    @property
    def corrected(self) -> float | None:
        """The estimate less its bias."""
        return None if self.estimate is None or self.bias is None else self.estimate - self.bias

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        return asdict(self)


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
    return {name: Interval(**entries) for name, entries in found.items()}


Ends = Callable[[Float[Tensor, ""], Float[Tensor, " r"]], tuple[Tensor, Tensor, Tensor]]
"""The metric of the sample, and of replicates → its corrected estimate, and the ends of its interval."""
Spread = Callable[[Float[Tensor, " r"]], Tensor]
"""The metric of replicates → its standard error."""


def intervals_of(
    spectra: tuple[Mapping[str, Spectrum], Spectrum, Spectrum],
    metrics: Mapping[str, Metric],
    num_leading: int,
    *,
    ends: Ends,
    spread: Spread,
    facts: Mapping[str, Any],
) -> Intervals:
    """The intervals of every metric and of the leading eigenvalues, `eigenvalue_1` and on, of all matrices.

    Where the metric is positive in the sample and in all replicates, the interval is one of its logarithm: errors of
    eigenvalues are ratios, and such an interval does not reach below zero.

    Args:
        spectra: Stacks, the sample first: by block, block-diagonal and full.
        metrics: {name: metric}.
        num_leading: How many eigenvalues, where there are so many.
        ends: How replicates make an interval.
        spread: How they make a standard error.
        facts: The fields of `Interval` that all have in common.
    """

    def interval(values: Float[Tensor, " r"]) -> Interval:
        on_log_scale = bool((values > 0).all())
        scaled = values.log() if on_log_scale else values
        found = ends(scaled[0], scaled[1:])
        center, low, high = (end.exp() if on_log_scale else end for end in found)
        return Interval(
            estimate=_finite(values[0]),
            low=_finite(low),
            high=_finite(high),
            standard_error=_finite(spread(values[1:])),
            bias=_finite(values[0] - center),
            **facts,
        )

    def of(stack: Spectrum) -> dict[str, Interval]:
        leading = {f"eigenvalue_{k + 1}": column for k, column in enumerate(stack.eigenvalues.T[:num_leading])}
        values = {name: metric(stack) for name, metric in metrics.items()} | leading
        return {name: interval(found.double()) for name, found in values.items()}

    blocks, block_diagonal, full = spectra
    return Intervals(
        blocks={label: of(stack) for label, stack in blocks.items()}, block_diagonal=of(block_diagonal), full=of(full)
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


def _finite(value: Tensor) -> float | None:
    return value.item() if math.isfinite(value) else None
