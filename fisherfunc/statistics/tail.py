"""The tail exponent of a spectrum: a power law fitted to its largest eigenvalues, and how well it fits.

Axis order: candidates for the beginning of the tail `(c,)`, eigenvalues in ascending order `(k,)`.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.statistics.density import resolved

LEAST = 10
WARNING = (
    "the exponent is that of the sample's spectrum, which the number of rows cuts off: where the population's falls "
    "slowly, like k^-1 or slower, it is too large, and neither the standard error nor the p-value shows it"
)


@dataclass(frozen=True, kw_only=True)
class TailExponent:
    """A power law of the largest eigenvalues, with density ∝ λ^-α for λ ≥ `begin`.

    Attributes:
        exponent: α. Eigenvalues that fall with rank like k^-s have α = 1 + 1/s.
        standard_error: (α − 1)/√n, of n independent eigenvalues.
        begin: The smallest eigenvalue of the tail.
        num_tail: n, how many eigenvalues it rests on.
        distance: The Kolmogorov–Smirnov distance between the tail and the law.
        p_value: The share of samples of the fitted law that fit worse; below 0.1 the law is implausible. None where not
            asked for.
        num_eigenvalues: How many were resolved.
        warning: Of a spectrum that the number of rows cuts off: that it is no estimate of the population's exponent.
    """

    exponent: float
    standard_error: float
    begin: float
    num_tail: int
    distance: float
    p_value: float | None
    num_eigenvalues: int
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        return asdict(self)


def tail_exponent(spectrum: Spectrum, *, least: int = LEAST, num_replicates: int = 200, seed: int = 0) -> TailExponent:
    """The exponent α of the tail, by maximum likelihood, from where a power law fits best.

    For a tail of the n eigenvalues λ ≥ x, α = 1 + n/Σ ln(λ/x); of all x that leave at least `least`, the one with the
    smallest Kolmogorov–Smirnov distance. The p-value is that of samples as large, with as many points of the law, on
    average, above x and draws from the other eigenvalues below it, each fitted in the same way, x included. Eigenvalues
    of one matrix repel each other and are not independent: error and p-value are what they would be if they were. A
    large p-value does not tell a power law from its rivals, and a tail of a few dozen points tells little at all.

    It is the exponent of the spectrum given. A sample's spectrum falls more slowly at its head than the population's
    where that falls slowly: Gaussian rows of 4,000 parameters, whose population has λ_k = k^-s, gave

        α of the population, 1 + 1/s     s = 0.5: 3.0    s = 1: 2.0    s = 2: 1.5
        200 rows                                  6.9           2.4           1.5
        500 rows                                  5.2           2.2           1.5

    with p-values near 1 throughout: neither they nor the standard error show this.

    Cost k² operations a fit of k eigenvalues.
    Source: Clauset, Shalizi and Newman, "Power-law distributions in empirical data", SIAM Review 2009.

    Args:
        spectrum: One spectrum; eigenvalues below its resolution are left out.
        least: The fewest eigenvalues that a tail may have.
        num_replicates: Samples for the p-value; 0 for none.
        seed: Of these.

    Raises:
        ValueError: If fewer eigenvalues than `least` are resolved, all of them are equal, or `least` is less than 3.
    """
    values = resolved(spectrum).double().cpu().sort().values
    if least < 3:
        raise ValueError(f"least expected at least 3 eigenvalues of a tail, got least={least!r}")
    if len(values) < least:
        raise ValueError(
            f"a tail exponent needs at least {least} resolved eigenvalues, got {len(values)}; take more tokens "
            "or a larger block"
        )
    if values[0] == values[-1]:
        raise ValueError(f"a tail exponent needs eigenvalues that differ, got {len(values)} of {values[0].item():.3e}")
    exponent, begin, distance = _fit(values, least)
    tail = int((values >= begin).sum())
    generator = torch.Generator().manual_seed(seed)
    worse = [_fit(_sample(values, begin, exponent, generator), least)[2] >= distance for _ in range(num_replicates)]
    return TailExponent(
        exponent=exponent,
        standard_error=(exponent - 1) / tail**0.5,
        begin=begin,
        num_tail=tail,
        distance=distance,
        p_value=sum(worse) / num_replicates if num_replicates else None,
        num_eigenvalues=len(values),
        warning=None if len(spectrum.eigenvalues) == spectrum.num_params else WARNING,
    )


def _fit(values: Float[Tensor, " k"], least: int) -> tuple[float, float, float]:
    """The exponent, beginning and distance of the best tail of ascending values."""
    count = len(values)
    logs = values.log()
    begins = torch.arange(count - least + 1, device="cpu")
    begins = begins[logs[begins] < logs[-1]]
    sizes = (count - begins).double()
    excess = logs.flip(0).cumsum(0).flip(0)[begins] - sizes * logs[begins]  # Σ ln(λ/x)
    slopes = sizes / excess  # α − 1
    law = 1 - torch.exp(-slopes[:, None] * (logs - logs[begins, None]))
    place = torch.arange(count, device="cpu") - begins[:, None]
    above, below = (place + 1) / sizes[:, None] - law, law - place / sizes[:, None]
    distances = torch.maximum(above, below).masked_fill(place < 0, 0).amax(dim=1)
    best = int(distances.argmin())
    return 1 + slopes[best].item(), values[begins[best]].item(), distances[best].item()


def _sample(
    values: Float[Tensor, " k"], begin: float, exponent: float, generator: torch.Generator
) -> Float[Tensor, " k"]:
    """As many values: of the law with the tail's share of the probability, else one of those below it."""
    body = values[values < begin]
    count = len(values)
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    sample = begin * (1 - draws) ** (-1 / (exponent - 1))
    if len(body):
        others = body[torch.randint(len(body), (count,), generator=generator, device="cpu")]
        in_tail = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu") < 1 - len(body) / count
        sample = torch.where(in_tail, sample, others)
    return sample.sort().values
