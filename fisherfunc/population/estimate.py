"""An estimate of the population with its interval, and the jackknife that makes one.

Axis order: clusters `(s,)`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = math.log(torch.finfo(torch.float64).max) - 1e-9
"""Of logarithms: an end beyond it would be no number."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a sample says of one number of the population.

    Attributes:
        estimate: The number; None where the sample gives an interval and no point.
        low: The lower end, within the range that the number can have; always a number.
        high: The upper end; always a number.
        level: The nominal coverage.
        num_clusters: How many independent clusters of tokens it rests on.
        method: How it was made.
        warning: Why not to print the interval, or the point; None where both can be relied on.
    """

    estimate: float | None
    low: float
    high: float
    level: float
    num_clusters: int
    method: str
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "Estimate":
        """Return what `to_dict` was called on."""
        return Estimate(**content)


class BlockEstimates(Mapping[str, Estimate]):
    """The estimates of each block, by label.

    Attributes:
        full: That of the full matrix.
    """

    def __init__(self, blocks: Mapping[str, Estimate], full: Estimate) -> None:
        self._blocks, self.full = dict(blocks), full

    def __getitem__(self, label: str) -> Estimate:
        return self._blocks[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        return f"BlockEstimates({self._blocks!r}, full={self.full!r})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive JSON."""
        return {"per_block": {label: e.to_dict() for label, e in self.items()}, "full": self.full.to_dict()}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "BlockEstimates":
        """Return what `to_dict` was called on."""
        blocks = {label: Estimate.from_dict(entry) for label, entry in content["per_block"].items()}
        return BlockEstimates(blocks, Estimate.from_dict(content["full"]))


def spread(left_out: Float[Tensor, " s"]) -> tuple[float, float]:
    """Return the standard error of the delete-one jackknife, and the degrees of freedom that it has.

    With d_s the deviations of the leave-one-out values from their mean,

        error² = (S−1)/S Σ d_s²,    degrees = min(S−1, 2 (Σ d²)²/(Σ d⁴ − (Σ d²)²/S)) / 2

    The second term is Satterthwaite's, of the jackknife's own variance: about S where clusters are alike, 2 where one
    cluster carries all. Half of it is what holds, as the fourth moment of a few skewed values is too small: by
    simulation of second moments and their ratios (λ = 1/k, 1/k² and spiked, Gaussian and lognormal norms, 8 and 20
    clusters, nominal 95 %) t of S − 1 degrees held the truth in 86 to 95 %, t of these in 91 to 98 %.

    Args:
        left_out: The value without each cluster.
    """
    count, deviations = len(left_out), left_out - left_out.mean()
    largest = float(deviations.abs().max())
    squares = (deviations / (largest or 1.0)).square()  # fourth powers of moments leave what float64 holds
    total, fourth = float(squares.sum()), float(squares.square().sum())
    excess = fourth - total**2 / count
    degrees = 2 * total**2 / excess if excess > 0 else math.inf
    return largest * math.sqrt((count - 1) / count * total), min(count - 1, degrees) / 2


def half_width(left_out: Float[Tensor, " s"], level: float) -> float:
    """Return t · error of the delete-one jackknife: what an end of an interval is away from the estimate.

    Args:
        left_out: The value without each cluster, on the scale of the interval.
        level: The nominal coverage of both sides together.
    """
    from scipy.special import stdtrit  # a third of a second, which no other command should take

    error, degrees = spread(left_out)
    return float(stdtrit(degrees, (1 + level) / 2)) * error


def jackknifed(
    value: Float[Tensor, ""],
    left_out: Float[Tensor, " s"],
    *,
    level: float,
    limits: tuple[float, float],
    method: str,
    warning: str | None = None,
    log: bool = True,
) -> Estimate:
    """Return an estimate with the interval of the delete-one jackknife around it, within the range of the number.

    The value is not corrected for bias: it is unbiased, or a ratio of such. Where it does not exist, with or without
    some cluster, the interval is the range, and says so.

    Args:
        value: The estimate.
        left_out: That without each cluster.
        level: The nominal coverage.
        limits: The range that the number can have.
        method: How it was made.
        warning: What is known against it.
        log: Whether the interval is one of the logarithm where the value is positive, and without each of the clusters
            too: errors of spectra are ratios.
    """
    num_clusters = len(left_out)
    if not bool(torch.isfinite(left_out).all() & torch.isfinite(value)):
        return Estimate(
            estimate=None,
            low=limits[0],
            high=limits[1],
            level=level,
            num_clusters=num_clusters,
            method=method,
            warning="gradients are zero, or those of different sequences have nothing in common: there is no estimate, "
            "and the ends are those of the range",
        )
    if bool((left_out == value).all()):  # no logarithm: its round-off would be all of the interval
        low = high = point = float(value)
    elif log and bool(((left_out > 0) & (value > 0)).all()):
        width, point = half_width(left_out.log(), level), float(value)
        low, high = point * math.exp(-width), math.exp(min(math.log(point) + width, LARGEST))
    else:
        width, point = half_width(left_out, level), float(value)
        low, high = point - width, point + width
    low, point, high = (min(max(number, limits[0]), limits[1]) for number in (low, point, high))
    return Estimate(
        estimate=point, low=low, high=high, level=level, num_clusters=num_clusters, method=method, warning=warning
    )


def of_square(square: Estimate) -> Estimate:
    """Return the estimate of a number from that of its square, which is not negative."""
    root = None if square.estimate is None else math.sqrt(square.estimate)
    return replace(square, estimate=root, low=math.sqrt(square.low), high=math.sqrt(square.high))


def check_level(level: float) -> None:
    """Raise where a level is no probability.

    Raises:
        ValueError: If so.
    """
    if not 0 < level < 1:
        raise ValueError(f"level expected a number between 0 and 1, got level={level!r}; 0.95 is usual")
