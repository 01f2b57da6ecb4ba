"""From Grams that lie on several ranks to spectra: each rank solves some of the blocks, and all get all results.

No rank holds more than its rows of the Grams, and the one matrix that it is solving, which comes from all of them;
where intervals are asked for, rank 0 holds all Grams.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfunc.gradients.planning.over_ranks import OF_POPULATION
from fisherfunc.linalg.grams.divided import DividedGrams, whole_on_first
from fisherfunc.linalg.kernels import checked, robust_eigh
from fisherfunc.linalg.lifting import GramKernel, solved
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.result import FisherSpectrum, apart_from
from fisherfunc.pipeline.solve import IntervalMethod, draws_of, interval_method, provenance_of, result_of
from fisherfunc.population.summary import summary_from, sums_of
from fisherfunc.statistics.block_grams import gathered
from fisherfunc.statistics.coupling import block_coupling


def spectrum_of_divided(
    grams: DividedGrams,
    *,
    blocks: Callable[[str], str] | None = None,
    center: bool = False,
    kernel: GramKernel | None = None,
    intervals: IntervalMethod = None,
    population: bool = False,
) -> FisherSpectrum:
    """Return what `spectrum_of_grams` does, on every rank; see there. Cost its share of the eigensolves a rank.

    Args:
        grams: Of a pass over ranks, in the unit that is wanted.
        blocks: Parameter name → block label.
        center: Whether to subtract the mean row.
        kernel: Gram → spectrum.
        intervals: Confidence intervals.
        population: Whether to estimate what holds of the population.
    """
    between = interval_method(intervals)
    grams = grams.center() if center else grams
    kernel = robust_eigh() if kernel is None else checked(kernel)
    everyone, labels = grams.everyone, gathered(grams, blocks)
    clusters, reason = draws_of(grams) if population else (None, None)
    sums = None if clusters is None else sums_of(grams, clusters, blocks=blocks)
    whole = apart_from(labels, "full")
    tasks = labels if len(labels) == 1 else {**labels, whole: tuple(grams.grams)}
    full = next(iter(labels)) if len(labels) == 1 else whole
    sampled = {(grams.labels or {}).get(name, name) for name in (grams.provenance.sampled_parameters or ())}
    shares = _shares(list(tasks), full, everyone.size, OF_POPULATION if sums else 0)
    mine: dict[str, Spectrum] = {}
    estimated = None
    for turn in range(max(map(len, shares))):
        here = [share[turn] if turn < len(share) else None for share in shares]
        gram = grams.assembled([None if label is None else tasks[label] for label in here])
        label = here[everyone.rank]
        if gram is None or label is None:
            continue
        spectrum = solved(kernel, gram)
        mine[label] = replace(spectrum, exact=spectrum.exact and sampled.isdisjoint(tasks[label]))
        if label == full and sums is not None and clusters is not None:
            estimated = summary_from(grams, gram.matrix.double(), clusters, sums)
    parts = whole_on_first(grams) if between is not None else None
    found: dict[str, Any] = {
        "spectra": pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, mine),
        "population": estimated,
        "intervals": None if parts is None or between is None else between(parts, blocks=blocks),
    }
    each = everyone.gathered("the spectra", found)
    device = next(iter(grams.grams.values())).device
    spectra = {label: spectrum for one in each for label, spectrum in one["spectra"].items()}
    spectra = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, spectra)
    provenance = provenance_of(grams, blocks, silent=reason)
    result = result_of({label: spectra[label] for label in labels}, spectra[full], provenance)
    return replace(
        result,
        coupling=block_coupling(grams, blocks=blocks),
        intervals=each[0]["intervals"],
        population=next((one["population"] for one in each if one["population"] is not None), None),
    )


def _shares(labels: list[str], full: str, size: int, beside: int) -> list[list[str]]:
    """The matrices that each rank solves: the full one is of rank 0, which estimates the population from it."""
    shares: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for label in sorted(labels, key=lambda label: label != full):
        rank = 0 if label == full else min(range(size), key=lambda rank: (loads[rank], -rank))
        loads[rank] += 1 + (beside if label == full else 0)
        shares[rank].append(label)
    return shares
