"""Footnotes of the table on the sample: which metrics its size sets, and what the intervals are."""

from fisherfunc.pipeline.result import FisherSpectrum, limits_of
from fisherfunc.statistics.interval import Interval

_FEW = 4
_SHOWN = {"condition_number": "condition number", "effective_rank": "eff. rank"}


def sample_notes(result: FisherSpectrum) -> list[str]:
    """A line for each column of the table whose numbers the size of the sample sets, with the matrices it is so of."""
    full = [("full matrix", result.full)] if len(result.blocks) > 1 else []  # else it is the one block
    spectra = [*result.blocks.items(), *full]
    limits = {label: limits_of(result, spectrum) for label, spectrum in spectra}
    unit, count = result.metadata.get("unit", "token"), result.full.num_tokens
    found = []
    for metric, name in _SHOWN.items():
        labels = [label for label, limit in limits.items() if metric in limit.set_by_sample]
        if labels:
            found.append(
                f"{name}: set by the number of {unit}s, {count:,}, as much as by the model, in {_listed(labels)}"
            )
    return found


def interval_note(interval: Interval) -> str:
    """What the ends of intervals are.

    Args:
        interval: Any of them.
    """
    return f"low, high: {interval.level:.0%} intervals by {interval.method} over {interval.num_sequences:,} sequences"


def _listed(labels: list[str]) -> str:
    """The labels, or where there are many, their number and the first and last of them.

    Example:
        >>> _listed(["a", "b"]), _listed(list("abcdef"))
        ('a, b', '6 matrices, a … f')
    """
    return ", ".join(labels) if len(labels) <= _FEW else f"{len(labels)} matrices, {labels[0]} … {labels[-1]}"
