"""What a result says of the population, for people: quantities beside those of the sample, tables, and lines below.

The population is what another sample of its sequences would give as well: what may be quoted without its N.
"""

from collections.abc import Iterable
from dataclasses import asdict
from types import ModuleType
from typing import Any, NamedTuple

from fisherfunc.linalg import metrics
from fisherfunc.pipeline.needed import tokens_needed
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.sheets import NO_INTERVAL, short, told
from fisherfunc.population.estimate import Estimate
from fisherfunc.population.second_moments import BlockCoupling
from fisherfunc.records.provenance import Provenance
from fisherfunc.records.sheet import figure
from fisherfunc.surface.reports.tables import Column, Row, table
from fisherfunc.surface.wording import count_of_units, tokens_lines


class Quantity(NamedTuple):
    """One number of the full matrix."""

    name: str
    sample: float | None
    population: Estimate


def quantities(result: FisherSpectrum) -> list[Quantity]:
    """Return what is known of the full matrix of the population beside that of the sample; nothing where none is.

    The effective dimension is that at the least κ that the tokens resolve.

    Args:
        result: The result.
    """
    found = result.population
    if found is None:
        return []
    sample: dict[str, Any] = metrics.summary(result.full)
    several = result.coupling is not None and len(result.blocks) > 1
    lines = [
        Quantity("trace", sample["trace"], found.trace.full),
        Quantity("participation ratio (tr F)²/‖F‖²", sample["participation_ratio"], found.participation_ratio.full),
    ]
    if result.coupling is not None and several:
        left_out = result.coupling.block_diagonal_error
        lines.append(Quantity("left out by blocks ‖F − F_bd‖/‖F‖", left_out, found.block_diagonal_error))
        a, b = _strongest(found.coupling)
        name = f"alignment of {found.coupling.labels[a]} and {found.coupling.labels[b]}"
        lines.append(Quantity(name, result.coupling.alignment[a][b], found.coupling.alignment[a][b]))
    lines.append(Quantity("λ_max", sample["largest"], found.leading_eigenvalue))
    curve = found.effective_dimension
    for kappa, dimension in zip(curve.kappas, curve.estimates, strict=True):
        if dimension.estimate is not None:
            values = result.full.eigenvalues
            name = f"effective dimension at κ = {kappa:.2g}, the least resolved"
            lines.append(Quantity(name, float((values / (values + kappa)).sum()), dimension))
            break
    return [*lines, Quantity("effective rank", sample["effective_rank"], found.effective_rank)]


def _strongest(coupling: BlockCoupling) -> tuple[int, int]:
    """The two blocks of the largest alignment."""
    count = range(len(coupling.labels))
    pairs = [(a, b) for a in count for b in count if a < b]
    return max(pairs, key=lambda pair: coupling.alignment[pair[0]][pair[1]].estimate or 0.0)


def population_tables(rich: ModuleType, result: FisherSpectrum, width: int) -> tuple[list[Any], list[str]]:
    """Return the tables of the population: of the full matrix beside the sample's, and by block; none where none is.

    With them go the headings of the columns that they have no room for.

    Args:
        rich: As of `require_rich`.
        result: The result.
        width: The columns of the terminal.
    """
    found = result.population
    if found is None:
        return [], []
    level = found.leading_eigenvalue.level
    title = (
        f"Of the population that these {found.num_clusters:,} {_draws(result)} were drawn from ({level:.0%} intervals)"
    )
    columns = [
        Column("full matrix", figures=False),
        Column("of the population", breaks=True),
        Column(f"of these {_count(result)}", rank=1),
    ]
    rows = [Row([one.name, told(one.population), short(one.sample)]) for one in quantities(result)]
    whole, left_out = table(rich, columns, rows, width=width, title=title, gap=1)
    if len(result.blocks) == 1:
        return [whole, ""], left_out
    columns = [
        Column("block", figures=False),
        Column("parameters", rank=1),
        Column("trace", breaks=True),
        Column("participation ratio", breaks=True),
    ]
    rows = [
        Row([label, figure(spectrum.num_params), told(found.trace[label]), told(found.participation_ratio[label])])
        for label, spectrum in result.blocks.items()
    ]
    by_block, without = table(rich, columns, rows, width=width, gap=1)
    return [whole, "", by_block, ""], left_out + without


def sample_heading(result: FisherSpectrum) -> str:
    """Return what stands above numbers of the sample alone, where those of the population are known."""
    return f"Of these {_count(result)} alone: all but the trace move with their number"


def population_notes(result: FisherSpectrum) -> list[str]:
    """Return the lines below the tables: why intervals are missing, what directions hold, and how many tokens it takes.

    Args:
        result: The result.
    """
    found = result.population
    if found is None:
        reason = result.provenance.population
        return [] if reason is None else [f"All numbers are of these {result.full.num_units:,} rows: {reason}"]
    named = [(one.name.split(" (tr")[0], one.population) for one in quantities(result)]
    if len(result.blocks) > 1:
        named += [(f"trace of {label}", estimate) for label, estimate in found.trace.items()]
        named += [(f"participation ratio of {label}", e) for label, e in found.participation_ratio.items()]
    leading = found.leading_sums
    pairs = zip(leading.out_of_sample, leading.in_sample, strict=True)
    shares = ", ".join(_two_digits(outside / value) for outside, value in pairs if value > 0)
    lines = _missing(named)
    lines += [f"Of the leading directions of these tokens, other {_draws(result)} hold {shares}"] if shares else []
    needed = {name: asdict(entry) for name, entry in tokens_needed(result).items()}
    if len(result.blocks) == 1:
        del needed["block_diagonal_error"]
    return [*lines, *tokens_lines(needed)]


def _missing(named: Iterable[tuple[str, Estimate]]) -> list[str]:
    """Why there is no interval, a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, estimate in named:
        if estimate.warning is not None:
            reasons.setdefault(estimate.warning, []).append(name)
    return [f"{NO_INTERVAL} of {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _draws(result: FisherSpectrum) -> str:
    """What counts as independent."""
    if result.population is not None and result.provenance.num_documents == result.population.num_clusters:
        return "documents"
    return "sequences" if not result.provenance.clusters else "clusters of sequences"


def _count(result: FisherSpectrum) -> str:
    return count_of_units(Provenance(num_tokens=result.full.num_units, unit=result.provenance.unit))


def _two_digits(share: float) -> str:
    """Two digits, and no power of ten.

    Example:
        >>> _two_digits(0.0044), _two_digits(0.036), _two_digits(1.02)
        ('0.44 %', '3.6 %', '102 %')
    """
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 else f"{100 * share:.2g} %"
