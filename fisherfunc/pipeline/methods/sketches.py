"""Spectra from projected rows, with the error of the projection beside every metric: a marked approximation.

Rows come from `rows` (gradients/sketched.py), or from a folder of them (`SketchedRows.load`).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fisherfunc.gradients.sketched import rows
from fisherfunc.linalg import metrics
from fisherfunc.linalg.grams.sketched_rows import SketchedRows
from fisherfunc.linalg.grams.sketches import Kronecker, kronecker, variance
from fisherfunc.linalg.lifting import GramKernel
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.partitioning import by_layer
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.solve import spectrum_of_grams

__all__ = ["Kronecker", "SketchedRows", "kronecker", "rows", "spectrum", "variance"]


def spectrum(
    sketched: SketchedRows, *, blocks: Callable[[str], str] = by_layer, kernel: GramKernel | None = None
) -> FisherSpectrum:
    """Return the spectra of ½(AAᵀ + BBᵀ)/N, with the error that the sketch alone gives to each metric.

    The error of a metric m has two parts, whose squares are added: how far it spreads, |m(A) − m(B)|/2, the standard
    error of a mean of two, known from two draws only; and how far it shifts, ½(m(A) + m(B)) − m, what half the sketch
    adds to the bias, which is the bias left where that falls like 1/rank. Eigenvalues of a sketch spread more than
    those of F, so that the largest is too large on average, and effective rank and participation ratio are too small as
    a rule; at a small rank by more than is shown. Sums that are linear in K, the trace above all, have no shift; ‖F‖²,
    and what the participation ratio is made of, are had without it from `SketchedRows.squared_norm` and
    `participation_ratio`, and are given beside.

    Args:
        sketched: The rows.
        blocks: Parameter name → block label.
        kernel: Gram → spectrum; `robust_eigh` where None.

    Returns:
        The result, marked in `metadata["approximations"]`; `metadata["sketch"]` has rank, seed, `errors`
        (`per_block`, `global` and `full`: {metric: its error, None where there is none}), and of the full matrix
        `squared_norm` and `participation_ratio`, unbiased. It says nothing of the population.

    Raises:
        ValueError: As `ff.spectrum_of_grams`.
    """
    result, one, other = (
        spectrum_of_grams(grams, blocks=blocks, kernel=kernel, unit=sketched.unit, population=False)
        for grams in (sketched.grams(), sketched.half(0), sketched.half(1))
    )
    facts: dict[str, Any] = {
        "rank": sketched.sketch.rank,
        "seed": sketched.sketch.seed,
        "errors": {
            "per_block": {
                label: _errors(whole, one.blocks[label], other.blocks[label]) for label, whole in result.blocks.items()
            },
            "global": _errors(result.block_diagonal, one.block_diagonal, other.block_diagonal),
            "full": _errors(result.full, one.full, other.full),
        },
        "squared_norm": sketched.squared_norm(),
        "participation_ratio": sketched.participation_ratio(),
    }
    return replace(result, coupling=None, provenance=replace(result.provenance, sketch=facts))


def _errors(whole: Spectrum, *halves: Spectrum) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, metric in metrics.SUMMARY.items():
        mean, one, other = (metric(spectrum).item() for spectrum in (whole, *halves))
        error = math.hypot((one - other) / 2, (one + other) / 2 - mean)
        found[name] = error if math.isfinite(error) else None
    return found
