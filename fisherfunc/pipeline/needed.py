"""How many tokens a number takes: a rule that an earlier result gives for the runs that follow it.

Of N tokens, each of which counts with itself, ‖F̂‖² = ‖F‖² + f/N on average, and so is what the block-diagonal matrix
leaves out of it, O + o/N. With f and o from one result, the participation ratio of the sample is q/(1 + f/(N ‖F‖²)) and
its block-diagonal error √((O + o/N)/(‖F‖² + f/N)), for any N of sequences of this length. An estimate of the population
has no such bias: the half width of its interval falls like 1/√N.
"""

import math
from dataclasses import dataclass

from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.population.estimate import Estimate

WITHIN = 0.1


@dataclass(frozen=True, kw_only=True)
class TokensNeeded:
    """From how many tokens on a number is right to a share of it; None where that cannot be said.

    Attributes:
        sample: That of the tokens themselves is so close to that of the population, on average.
        population: The interval of the estimate of the population is no wider than that, to each side.
    """

    sample: int | None
    population: int | None


def tokens_needed(result: FisherSpectrum, *, within: float = WITHIN) -> dict[str, TokensNeeded]:
    """Return how many tokens trace, participation ratio and block-diagonal error of the full matrix take.

    An extrapolation: of the embedded model, 504 tokens say 93,000 for the participation ratio of the sample, and 2,016
    say 66,000.

    Args:
        result: Of the same model and text, with estimates of the population; of any number of tokens.
        within: How close, as a share of the number.

    Raises:
        ValueError: If the result has no estimates of the population, or `within` is no positive number.
    """
    found = result.population
    if found is None:
        reason = result.provenance.population or "run fisher_spectrum with population=True"
        raise ValueError(f"the number of tokens needs a result with estimates of the population, got none: {reason}")
    if not within > 0:
        raise ValueError(f"within expected a positive share, got within={within!r}")
    count = result.full.num_tokens
    estimates = {
        "trace": found.trace.full,
        "participation_ratio": found.participation_ratio.full,
        "block_diagonal_error": found.block_diagonal_error,
    }
    sample = {"participation_ratio": _for_ratio(result, within), "block_diagonal_error": _for_error(result, within)}
    return {
        name: TokensNeeded(sample=sample.get(name), population=_for_interval(estimate, count, within))
        for name, estimate in estimates.items()
    }


def _for_interval(found: Estimate, count: int, within: float) -> int | None:
    if found.estimate is None or found.warning is not None or found.low <= 0:
        return None
    return max(1, math.ceil(count * (math.log(found.high / found.low) / 2 / math.log1p(within)) ** 2))


def _for_ratio(result: FisherSpectrum, within: float) -> int | None:
    found = result.population
    assert found is not None
    norm = found.squared_norm.full.estimate
    if not norm:
        return None
    excess = float(result.full.eigenvalues.square().sum()) / norm - 1
    return max(1, math.ceil(result.full.num_tokens * excess / within))


def _for_error(result: FisherSpectrum, within: float) -> int | None:
    """Where (O + o x)/(‖F‖² + f x), x = 1/N, leaves the range of its value at x = 0 that is allowed."""
    found, coupling, count = result.population, result.coupling, result.full.num_tokens
    assert found is not None
    norm, error = found.squared_norm.full.estimate, found.block_diagonal_error.estimate
    if coupling is None or not norm or not error:
        return None
    own = sum(map(sum, coupling.squared_norms))
    off = error**2 * norm
    f, o = count * (own - norm), count * (coupling.block_diagonal_error**2 * own - off)
    squared = (1 + within) ** 2 if o * norm > f * off else (1 + within) ** -2
    x = (squared - 1) * off / (o - squared * off / norm * f) if o != squared * off / norm * f else math.inf
    return max(1, math.ceil(1 / x)) if 0 < x < math.inf else 1
