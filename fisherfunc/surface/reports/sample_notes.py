"""Footnotes of the table on the sample: which metrics its size sets, and what the intervals are."""

from collections.abc import Collection, Mapping

from fisherfunc.pipeline.result import FisherSpectrum, limits_of
from fisherfunc.statistics.resampling.interval import OUTSIDE, Interval, Intervals

_FEW = 4
_SHOWN = {"condition_number": "condition number", "effective_rank": "eff. rank"}
_NAMES = {"largest": "λ_max", "second": "λ_2"} | _SHOWN


def sample_notes(result: FisherSpectrum, metrics: Collection[str] = tuple(_SHOWN)) -> list[str]:
    """A line for each column of the table whose numbers the size of the sample sets, with the matrices it is so of.

    Args:
        result: The result.
        metrics: Those that are shown.
    """
    full = [("full matrix", result.full)] if len(result.blocks) > 1 else []  # else it is the one block
    spectra = [*result.blocks.items(), *full]
    limits = {label: limits_of(result, spectrum) for label, spectrum in spectra}
    unit, count = result.provenance.unit or "token", result.full.num_units
    found = []
    for metric, name in _SHOWN.items():
        labels = [label for label, limit in limits.items() if metric in limit.set_by_sample]
        if labels and metric in metrics:
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


def interval_notes(intervals: Intervals, metrics: Collection[str]) -> list[str]:
    """What the ends of intervals are, and of which metrics and matrices there is none, or not around the estimate; why.

    Args:
        intervals: All of a result.
        metrics: Those that are shown.
    """
    matrices = {**intervals.blocks, "block-diagonal": intervals.block_diagonal, "full matrix": intervals.full}
    found: dict[str, dict[str, list[str]]] = {}
    for metric in metrics:
        name = _NAMES.get(metric, metric.replace("_", " "))
        for label, of_matrix in matrices.items():
            note = of_matrix[metric].note if metric in of_matrix else None
            if note is not None:
                found.setdefault(note, {}).setdefault(name, []).append(label)
    first = [interval_note(interval) for interval in intervals.full.values()][:1]
    return first + [_noted(note, names, len(matrices)) for note, names in found.items()]


def _noted(note: str, names: Mapping[str, list[str]], count: int) -> str:
    """One note, and what it is on: metrics with the matrices of each.

    Example:
        >>> _noted("it jumps", {"gap": ["a", "b"], "trace": ["a"]}, 2)
        'no interval of gap in all, trace in a: it jumps'
    """
    listed = ", ".join(f"{name} in {'all' if len(of) == count else _listed(of)}" for name, of in names.items())
    return f"{'estimate outside' if note == OUTSIDE else 'no interval of'} {listed}: {note}"


def _listed(labels: list[str]) -> str:
    """The labels, or where there are many, their number and the first and last of them.

    Example:
        >>> _listed(["a", "b"]), _listed(list("abcdef"))
        ('a, b', '6 matrices, a … f')
    """
    return ", ".join(labels) if len(labels) <= _FEW else f"{len(labels)} matrices, {labels[0]} … {labels[-1]}"
