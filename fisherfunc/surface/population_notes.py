"""Lines under the table on the population: what another sample of its sequences would give as well."""

from collections.abc import Callable
from dataclasses import asdict

from fisherfunc.pipeline.needed import tokens_needed
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.population.estimate import Estimate
from fisherfunc.surface.wording import NOTHING, number, tokens_lines


def population_notes(result: FisherSpectrum) -> list[str]:
    """Say what the sample says of the population, a line per quantity; or why it says nothing.

    Args:
        result: The result.
    """
    found = result.population
    if found is None:
        reason = result.metadata.get("population")
        return [] if reason is None else [f"All numbers are of these {result.full.num_units:,} rows: {reason}"]
    level = found.leading_eigenvalue.level
    curve = found.effective_dimension
    resolved = next(
        ((k, d) for k, d in zip(curve.kappas, curve.estimates, strict=True) if d.estimate is not None), None
    )
    lines = {
        "trace": (found.trace.full, _scientific),
        "participation ratio (tr F)²/‖F‖²": (found.participation_ratio.full, _plain),
        "‖F − F_bd‖/‖F‖": (found.block_diagonal_error, _percent),
        "λ_max": (found.leading_eigenvalue, _scientific),
        "effective rank": (found.effective_rank, _plain),
    }
    if len(result.blocks) == 1:
        del lines["‖F − F_bd‖/‖F‖"]
    if resolved is not None:
        lines[f"effective dimension at κ = {resolved[0]:.2g}, the least that is resolved"] = (resolved[1], _plain)
    draws = "sequences" if result.metadata.get("clusters") is None else "clusters of sequences"
    if result.metadata.get("num_documents") == found.num_clusters:
        draws = "documents"
    leading = found.leading_sums
    pairs = zip(leading.out_of_sample, leading.in_sample, strict=True)
    shares = ", ".join(_two_digits(outside / value) for outside, value in pairs if value > 0)
    heading = (
        f"Of the population that these {found.num_clusters:,} {draws} were drawn from ({level:.0%} intervals), where "
        "the table is of these tokens:"
    )
    told = [f"{name}: {_told(estimate, shown)}" for name, (estimate, shown) in lines.items()]
    told += [f"leading directions, of which other sequences show: {shares}"] if shares else []
    needed = {name: asdict(entry) for name, entry in tokens_needed(result).items()}
    if len(result.blocks) == 1:
        del needed["block_diagonal_error"]
    return [heading, *(f"  {line}" for line in told), *tokens_lines(needed)]


def _told(estimate: Estimate, shown: Callable[[float | None], str]) -> str:
    """A point with its interval, or an interval alone; of what has a warning no interval, and the warning."""
    low, point, high = shown(estimate.low), shown(estimate.estimate), shown(estimate.high)
    if estimate.warning is not None:
        return ("" if estimate.estimate is None else f"{point}; ") + f"no interval: {estimate.warning}"
    return f"between {low} and {high}" if estimate.estimate is None else f"{point} ({low} … {high})"


def _scientific(value: float | None) -> str:
    return number(value, digits=3)


def _plain(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"


def _two_digits(share: float) -> str:
    """Two digits, and no power of ten.

    Example:
        >>> _two_digits(0.0044), _two_digits(0.036), _two_digits(1.02)
        ('0.44 %', '3.6 %', '102 %')
    """
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 else f"{100 * share:.2g} %"
