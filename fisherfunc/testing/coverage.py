"""How often confidence intervals hold the truth, by simulation: Gaussian gradients of known covariance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fisherfunc.linalg.gram import gram_of
from fisherfunc.linalg.grams.token_grams import TokenGrams, Tokens
from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.records.provenance import Provenance
from fisherfunc.statistics.resampling.interval import Interval, Intervals


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How one metric's intervals did.

    Attributes:
        truth: The metric of the population.
        share: Of the samples whose interval held the truth; one without an interval held nothing.
        mean_estimate: The mean of the estimates.
        mean_corrected: The mean of the estimates less their estimated bias.
        num_samples: How many samples there were.
    """

    truth: float
    share: float
    mean_estimate: float
    mean_corrected: float
    num_samples: int


def clustered_grams(
    eigenvalues: Sequence[float], *, num_sequences: int, num_tokens: int, correlation: float, seed: int
) -> TokenGrams:
    """The Grams of Gaussian rows with the covariance diag(λ), dependent within a sequence.

    Token t of sequence s has g_{s,t} = √λ ∘ (√ρ u_s + √(1−ρ) e_{s,t}), u and e standard normal: F has the expectation
    diag(λ) whatever ρ is.

    Args:
        eigenvalues: λ.
        num_sequences: How many sequences.
        num_tokens: Of each.
        correlation: ρ, from 0 to 1.
        seed: Of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    deviations = torch.tensor(eigenvalues, dtype=torch.float64, device="cpu").sqrt()
    shape = num_sequences, num_tokens, len(deviations)
    shared = torch.randn(num_sequences, 1, len(deviations), generator=generator, dtype=torch.float64, device="cpu")
    own = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    rows = (deviations * (correlation**0.5 * shared + (1 - correlation) ** 0.5 * own)).flatten(0, 1)
    index = torch.arange(len(rows), device="cpu")
    return TokenGrams(
        grams={"weight": gram_of(rows)},
        tokens=Tokens(sequence=index // num_tokens, position=index % num_tokens, loss=rows.new_zeros(len(rows))),
        scale={},
        num_params={"weight": len(deviations)},
        unit="token",
        centered=False,
        precision=torch.float64,
        provenance=Provenance(),
    )


def coverage(
    interval: Callable[[TokenGrams], Intervals],
    eigenvalues: Sequence[float],
    *,
    num_sequences: int,
    num_tokens: int,
    correlation: float = 0.3,
    num_samples: int = 200,
    seed: int = 0,
) -> dict[str, Coverage]:
    """The coverage of every metric of `ff.metrics` and of the leading eigenvalues. Its error is √(c(1−c)/samples).

    Args:
        interval: What makes the intervals, such as `ff.statistics.jackknife`.
        eigenvalues: Of the population, largest first, all positive.
        num_sequences: How many sequences a sample has.
        num_tokens: How many tokens each.
        correlation: Between the gradients of two tokens of a sequence.
        num_samples: How many samples are drawn.
        seed: Of the first; the others have those that follow.
    """
    draw = partial(
        clustered_grams, eigenvalues, num_sequences=num_sequences, num_tokens=num_tokens, correlation=correlation
    )
    found = [interval(draw(seed=seed + n)).full for n in range(num_samples)]
    truth = _truth(eigenvalues)
    return {name: _coverage(truth[name], [sample[name] for sample in found]) for name in found[0] if name in truth}


def _truth(eigenvalues: Sequence[float]) -> dict[str, float]:
    spectrum = Spectrum(
        eigenvalues=torch.tensor(eigenvalues, dtype=torch.float64, device="cpu"),
        resolution=torch.zeros((), dtype=torch.float64, device="cpu"),
        negative_part=torch.zeros((), dtype=torch.float64, device="cpu"),
        num_units=1,
        num_params=len(eigenvalues),
        solver="given",
    )
    leading = {f"eigenvalue_{k}": value for k, value in enumerate(eigenvalues, start=1)}
    return {name: metric(spectrum).item() for name, metric in SUMMARY.items()} | leading


def _coverage(truth: float, intervals: list[Interval]) -> Coverage:
    held = [i.known and i.low <= truth <= i.high for i in intervals]
    return Coverage(
        truth=truth,
        share=sum(held) / len(held),
        mean_estimate=_mean([i.estimate for i in intervals]),
        mean_corrected=_mean([i.corrected for i in intervals]),
        num_samples=len(held),
    )


def _mean(values: list[float | None]) -> float:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else float("nan")
