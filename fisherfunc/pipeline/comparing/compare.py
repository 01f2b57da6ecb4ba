"""`compare`: lines several results up, and refuses where their numbers would not mean the same."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.directions import Eigenvectors, subspace_overlap
from fisherfunc.linalg.alignment import centred_alignment
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.grams.which_fisher import EMPIRICAL, EXACT
from fisherfunc.linalg.grams.which_loss import described_losses, same_loss
from fisherfunc.linalg.metrics import SUMMARY, summary
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.partitioning import by_layer
from fisherfunc.pipeline.comparing.comparison import Comparison, Table
from fisherfunc.pipeline.result import FisherSpectrum, apart_from
from fisherfunc.pipeline.solve import IntervalMethod, spectrum_of_grams
from fisherfunc.population.estimate import Estimate
from fisherfunc.population.paired import dimension_estimate, paired_dimension, paired_ratio
from fisherfunc.records.provenance import Provenance
from fisherfunc.statistics.block_grams import gathered
from fisherfunc.statistics.resampling.interval import Interval, Intervals

ALWAYS = {
    "unit": "what a row of G is; compute both with one unit",
    "normalization": "what F is divided by; compute both with one version",
}
"""What results have to agree in, and why."""
ACROSS = {
    "tokens": "other data",
    "fisher": "the empirical against the true Fisher, say",
    "loss": "models of several kinds",
    "centered": "the gradient covariance against the Fisher",
    "blocks": "only the blocks of one label are then held against each other",
}
"""What they have to agree in unless `across` names it, and what a difference may be for."""


def compare(
    results: Mapping[Any, FisherSpectrum | TokenGrams],
    *,
    across: Iterable[str] = (),
    blocks: Callable[[str], str] | None = None,
    intervals: IntervalMethod = None,
    population: bool = False,
    vectors: Mapping[Any, Eigenvectors] | None = None,
) -> Comparison:
    """Checkpoints, models or data sets side by side: every metric of every block, and its ratio to the first result.

    The numbers of two results mean the same only where unit, normalisation, Fisher, centring, loss, tokens and rule of
    blocks are the same (a loss of one's own by its code, not its name): anything else is refused, unless `across` says
    that it is what the comparison is of. Of `TokenGrams` on the same tokens there is also the centred kernel alignment
    (not of draws). Of results on the same tokens and clusters that have estimates of the population, ratios of these
    have paired intervals: models on the same tokens err together. Cost: nothing for spectra; for Grams the eigensolves,
    and 2 N² operations a pair and block.

    Args:
        results: {name: spectra or Grams}, two or more; steps may be names.
        across: In what results may differ: "tokens", "fisher", "loss", "centered", "blocks".
        blocks: Of Grams: parameter name → block label; where None, the blocks that they were accumulated by, or
            `by_layer`.
        intervals: Of Grams: "bootstrap" or "jackknife" (see `spectrum_of_grams`); spectra bring their own.
        population: Of Grams: whether to estimate what holds of the population (see `spectrum_of_grams`); spectra bring
            their own.
        vectors: {name: leading eigenvectors} of each result (`ff.fisher_eigenvectors`), whose subspaces are compared.

    Raises:
        ValueError: If there are fewer than two results, they differ in something (it says in what, and how), `across`
            names nothing that it may, Grams of the same tokens have their rows in different orders, or eigenvectors
            are not one for each result, all of one block and of the same parameters.
        TypeError: If a result is of another type.

    Example:
        >>> import fisherfunc as ff
        >>> batch = (torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> found = compare({step: ff.fisher_spectrum(torch.nn.Linear(2, 3), batch) for step in (0, 100)})
        >>> found.names, found.ratios["full"]["trace"]["0"]
        (['0', '100'], 1.0)
    """
    named = {str(name): _checked(str(name), result) for name, result in results.items()}
    if len(named) < 2:
        raise ValueError(f"compare expected at least two results of different names, got {list(results)}")
    spectra = {name: _spectrum(result, blocks, intervals, population) for name, result in named.items()}
    differing = _differences({name: result.provenance for name, result in spectra.items()}, set(across))
    values = _table(spectra)
    alike = {} if "tokens" in differing else _similarity(named, blocks)
    return Comparison(
        results=spectra,
        values=values,
        ratios=_ratios(values),
        intervals=_intervals(spectra),
        paired={} if "tokens" in differing else _paired(spectra),
        kappa=_kappa(spectra),
        similarity=alike,
        overlaps={} if vectors is None else _overlaps({str(name): v for name, v in vectors.items()}, list(named)),
        differing=differing,
    )


def _checked(name: str, result: Any) -> FisherSpectrum | TokenGrams:
    if not isinstance(result, FisherSpectrum | TokenGrams):
        raise TypeError(f"result {name!r} expected a FisherSpectrum or TokenGrams, got {type(result).__name__}")
    return result


def _spectrum(
    result: FisherSpectrum | TokenGrams,
    blocks: Callable[[str], str] | None,
    intervals: IntervalMethod,
    population: bool,
) -> FisherSpectrum:
    if isinstance(result, FisherSpectrum):
        return result
    return spectrum_of_grams(result, blocks=blocks, unit=result.unit, intervals=intervals, population=population)


def _differences(facts: Mapping[str, Provenance], across: set[str]) -> dict[str, dict[str, Any]]:
    """{aspect: {name: value}} of those that differ.

    Raises:
        ValueError: If one does that may not.
    """
    unknown = sorted(across - set(ACROSS))
    if unknown:
        reasons = "; ".join(f"{name!r} never: {why}" for name, why in ALWAYS.items() if name in unknown)
        raise ValueError(
            f"across expected some of {list(ACROSS)}, got {unknown}" + (f" ({reasons})" if reasons else "")
        )
    found = {aspect: {name: _aspect(aspect, f) for name, f in facts.items()} for aspect in (*ALWAYS, *ACROSS)}
    found["loss"] = described_losses(facts)
    agreeing = {aspect for aspect, values in found.items() if aspect != "loss" and _agree(aspect, values)}
    agreeing |= {"loss"} if same_loss(facts.values()) else set()
    differing = {aspect: values for aspect, values in found.items() if aspect not in agreeing}
    refused = [aspect for aspect in differing if aspect not in across]
    if refused:
        raise ValueError(_refusal({aspect: differing[aspect] for aspect in refused}))
    return differing


def _aspect(aspect: str, facts: Provenance) -> Any:
    return bool(facts.centered) if aspect == "centered" else getattr(facts, aspect)


def _agree(aspect: str, values: Mapping[str, Any]) -> bool:
    """Tokens that are not known are not known to be the same."""
    different = set(values.values())
    return len(different) == 1 and not (aspect == "tokens" and different == {None})


def _refusal(refused: Mapping[str, Mapping[str, Any]]) -> str:
    listed = "; ".join(
        f"{aspect}: " + ", ".join(f"{'unknown' if v is None else repr(v)} of {name!r}" for name, v in values.items())
        for aspect, values in refused.items()
    )
    never = [f"{aspect} may not differ ({ALWAYS[aspect]})" for aspect in refused if aspect in ALWAYS]
    allowed = [aspect for aspect in refused if aspect not in ALWAYS]
    may = [f"allowed where across names them: {', '.join(allowed)}"] if allowed else []
    return f"results that differ cannot be compared: {'; '.join([listed, *never, *may])}"


def _labels(results: Mapping[str, FisherSpectrum]) -> tuple[list[str], str, str]:
    """Those of all blocks, and what the block-diagonal and the full matrix are called beside them."""
    labels = list(dict.fromkeys(label for result in results.values() for label in result.blocks))
    return labels, apart_from(labels, "block_diagonal"), apart_from(labels, "full")


def _table(results: Mapping[str, FisherSpectrum]) -> Table:
    """Every metric, of every label that a result has."""
    labels, union, full = _labels(results)
    rows: dict[str, dict[str, Spectrum | None]] = {
        label: {name: result.blocks.get(label) for name, result in results.items()} for label in labels
    }
    rows[union] = {name: result.block_diagonal for name, result in results.items()}
    rows[full] = {name: result.full for name, result in results.items()}
    return {label: _metrics(row) for label, row in rows.items()}


def _metrics(row: Mapping[str, Spectrum | None]) -> dict[str, dict[str, float | int | None]]:
    found: dict[str, dict[str, Any]] = {name: summary(s) if s is not None else {} for name, s in row.items()}
    return {metric: {name: values.get(metric) for name, values in found.items()} for metric in SUMMARY}


def _intervals(results: Mapping[str, FisherSpectrum]) -> dict[str, dict[str, dict[str, Interval | None]]]:
    """Laid out as the table of values."""
    labels, union, full = _labels(results)
    none = Intervals(blocks={}, block_diagonal={}, full={})
    known = {name: result.intervals or none for name, result in results.items()}
    rows = {label: {name: found.blocks.get(label, {}) for name, found in known.items()} for label in labels}
    rows[union] = {name: found.block_diagonal for name, found in known.items()}
    rows[full] = {name: found.full for name, found in known.items()}
    return {
        label: {metric: {name: found.get(metric) for name, found in row.items()} for metric in SUMMARY}
        for label, row in rows.items()
    }


def _paired(results: Mapping[str, FisherSpectrum]) -> dict[str, dict[str, dict[str, Estimate | None]]]:
    """Ratios of estimates of the population to those of the first result, where both leave out the same clusters."""
    found = {name: result.population.left_out for name, result in results.items() if result.population is not None}
    clusters = {name: result.provenance.clusters or None for name, result in results.items()}
    kinds = {name: (left and left.num_clusters, clusters[name]) for name, left in found.items()}
    first = next(iter(results))
    if len(found) < len(results) or None in found.values() or len(set(kinds.values())) > 1:
        return {}
    labels, _, full = _labels(results)

    def of(label: str, name: str) -> Mapping[str, tuple[float, ...]]:
        left = found[name]
        assert left is not None
        return left.full if label == full else left.per_block.get(label, {})

    def ratio(label: str, estimate: str, name: str) -> Estimate | None:
        value, of_first = of(label, name).get(estimate), of(label, first).get(estimate)
        return None if name == first or value is None or of_first is None else paired_ratio(value, of_first)

    paired = {
        label: {e: {name: ratio(label, e, name) for name in results} for e in of(label, first)}
        for label in (*labels, full)
    }
    kappa = _kappa(results)
    if kappa is None:
        return paired
    left_out = {name: left for name, left in found.items() if left is not None}
    warnings = {name: _warning(results[name], kappa) for name in results}
    dimensions = {
        name: None
        if name == first
        else paired_dimension(left, left_out[first], kappa, warning=warnings[name] or warnings[first])
        for name, left in left_out.items()
    }
    return paired | {full: paired[full] | {"effective_dimension": dimensions}}


def _warning(result: FisherSpectrum, kappa: float) -> str | None:
    """What warns of the effective dimension at κ."""
    assert result.population is not None
    curve = result.population.effective_dimension
    found = dimension_estimate(result.population.left_out, curve, kappa, num_params=math.inf)
    return None if found is None else found.warning


def _kappa(results: Mapping[str, FisherSpectrum]) -> float | None:
    """The least κ that all results resolve."""
    found = [result.population.left_out for result in results.values() if result.population is not None]
    least = [min(left.dimensions) for left in found if left is not None and left.dimensions]
    return max(least) if len(least) == len(results) else None


def _ratios(values: Table) -> Table:
    def over_first(row: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
        first = next(iter(row.values()))
        return {name: None if value is None or not first else value / first for name, value in row.items()}

    return {label: {metric: over_first(row) for metric, row in rows.items()} for label, rows in values.items()}


def _similarity(
    results: Mapping[str, FisherSpectrum | TokenGrams], blocks: Callable[[str], str] | None
) -> dict[str, Tensor]:
    """The alignment of every pair, by the blocks that all have, and of the full matrix.

    Of nothing but Grams, and not of draws: each model has drawn its own targets, and draws that are independent are not
    aligned.
    """
    grams = {name: result for name, result in results.items() if isinstance(result, TokenGrams)}
    if len(grams) < len(results) or any(g.fisher not in (EMPIRICAL, EXACT) for g in grams.values()):
        return {}
    _check_order(grams)
    parts = [gathered(g, blocks or (by_layer if g.labels is None else None)) for g in grams.values()]
    common = [label for label in parts[0] if all(label in part for part in parts)]

    def alignment(names: Iterable[Iterable[str] | None]) -> Tensor:
        device = next(iter(grams.values())).tokens.sequence.device
        return centred_alignment(
            torch.stack([g.block(n).to(device) for g, n in zip(grams.values(), names, strict=True)])
        )

    found = {label: alignment(part[label] for part in parts) for label in common}
    return found | {apart_from(found, "full"): alignment(None for _ in parts)}


def _check_order(grams: Mapping[str, TokenGrams]) -> None:
    """Raise where rows are not those of the same tokens, one by one."""
    (first, one), *others = grams.items()
    for name, other in others:
        pairs = [(getattr(one.tokens, field), getattr(other.tokens, field)) for field in ("sequence", "position")]
        if not all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs):
            raise ValueError(
                f"the rows of {name!r} are the tokens of {first!r} in another order; select them in one order, or "
                "compare their spectra (ff.spectrum_of_grams), which know no order"
            )


def _overlaps(vectors: Mapping[str, Eigenvectors], names: list[str]) -> dict[str, Tensor]:
    """The overlap of every pair of subspaces, under the label of their block."""
    labels = {v.label for v in vectors.values()}
    if set(vectors) != set(names) or len(labels) != 1:
        raise ValueError(
            f"vectors expected eigenvectors of one block for each of {names}, got those of {list(vectors)}, "
            f"of blocks {sorted(map(str, labels))}"
        )
    trees = [vectors[name].vectors for name in names]
    rows = [torch.stack([subspace_overlap(a, b).overlap for b in trees]) for a in trees]
    return {labels.pop(): torch.stack(rows)}
