"""From Grams, or from gradients already at hand, to spectra: no model, no pass, any partition.

Grams add, so the partition, the unit and the centring are chosen here, after the pass, at no further pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from fisherfunc.linalg.gram import gram_norm, raise_vanished, squares_vanish
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.kernels import cheapest, checked, robust_eigh
from fisherfunc.linalg.lifting import GramKernel, RowKernel, gram_kernel, solved
from fisherfunc.linalg.mapped import check_not_mapped
from fisherfunc.linalg.sound_spectrum import asked, moments_of_rows
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.linalg.union import union
from fisherfunc.partitioning import by_layer, partition, rule_name
from fisherfunc.pipeline.result import FisherSpectrum, apart_from
from fisherfunc.population.clusters import ClusterLabels, Clusters, cluster_id, clustered, clusters_of
from fisherfunc.population.summary import summary_of
from fisherfunc.records.plain import dtype_name
from fisherfunc.records.provenance import Provenance
from fisherfunc.runtime.precision import full_precision
from fisherfunc.runtime.versions import versions
from fisherfunc.statistics.block_grams import gathered
from fisherfunc.statistics.coupling import block_coupling
from fisherfunc.statistics.resampling.bootstrap import bootstrap
from fisherfunc.statistics.resampling.interval import Intervals
from fisherfunc.statistics.resampling.jackknife import jackknife

IntervalMethod = str | Callable[..., Intervals] | None
_INTERVALS: dict[str, Callable[..., Intervals]] = {"bootstrap": bootstrap, "jackknife": jackknife}
NORMALIZATION = "F = (1/N) GᵀG, N = number of units"


def spectrum_of_grams(
    grams: TokenGrams,
    *,
    blocks: Callable[[str], str] | None = None,
    center: bool = False,
    unit: str = "token",
    kernel: GramKernel | None = None,
    intervals: IntervalMethod = None,
    population: bool = False,
    clusters: ClusterLabels = None,
) -> FisherSpectrum:
    """Compute the spectra of a partition from Grams. Cost about 4/3 N³ operations per block and for the full matrix.

    Args:
        grams: The Grams of a pass.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by, or `by_layer`.
        center: Whether to subtract the mean row: the gradient covariance in place of the Fisher.
        unit: What a row is: "token", or "sequence" (the sum of its tokens' rows).
        kernel: Gram → spectrum, whose result is `checked`; `kernels.robust_eigh()` where None.
        intervals: Confidence intervals of the trace of each matrix by "bootstrap" or "jackknife" over sequences, or
            by a function such as `partial(ff.statistics.bootstrap, level=0.9)`; none where None. Other metrics
            have a note why they have none.
        population: Whether to estimate what holds of the population as well (`ff.population.summary`): the full matrix
            is then solved with vectors, once, and one to two times as much again. Where nothing can be said,
            `metadata["population"]` says why.
        clusters: A label per sequence, where sequences are not independent of each other (paragraphs of a document):
            they take the place of sequences in the intervals and in what is said of the population.

    Returns:
        The spectra of the blocks, of their union and of the full matrix, the coupling of the blocks, and what was asked
        for of the population.

    Raises:
        ValueError: If the unit is unknown, unit or blocks are finer than those of the Grams, a Gram is indefinite, or
            there is one sequence only and intervals are asked for, the rows are not to be centred or summed, as their
            targets are not the observed ones, a kernel returned no spectrum of the Gram, or clusters are neither one
            per sequence nor one per row.
        TypeError: If the kernel cannot be called like one, or returned something else than a `Spectrum`.
        torch.linalg.LinAlgError: If every eigensolver failed.
    """
    instead = "map a kernel over the stack, as vmap(lambda grams: ff.kernels.robust_eigh()(grams.summed()))(stack)"
    check_not_mapped("spectrum_of_grams", grams.grams.values(), instead=instead)
    between = interval_method(intervals)
    grams = _in_unit(clustered(grams, clusters), unit)
    grams = grams.center() if center else grams
    solver = robust_eigh() if kernel is None else checked(kernel)
    blocks = blocks or (by_layer if grams.labels is None else None)
    labels = gathered(grams, blocks)
    draws, reason = draws_of(grams) if population else (None, None)
    eigenpairs = None
    if draws is not None and kernel is None:  # estimates need vectors of the full matrix, whose values are then known
        try:
            eigenpairs = torch.linalg.eigh(grams.block().double())
        except torch.linalg.LinAlgError as error:  # the kernel has other ways, without vectors
            draws, reason = None, f"the eigenvectors of the full matrix could not be computed: {error}"
    sampled = {(grams.labels or {}).get(name, name) for name in (grams.provenance.sampled_parameters or ())}

    def solve(names: Sequence[str], by: GramKernel) -> Spectrum:
        spectrum = solved(by, grams.summed(names))
        return replace(spectrum, exact=spectrum.exact and sampled.isdisjoint(names))

    spectra = {label: solve(names, solver) for label, names in labels.items()} if len(labels) > 1 else {}
    full = solve(list(grams), solver if eigenpairs is None else _known(eigenpairs[0]))
    spectra = spectra or dict.fromkeys(labels, full)
    estimated = None if draws is None else summary_of(grams, draws, blocks=blocks, eigenpairs=eigenpairs)
    return replace(
        result_of(spectra, full, provenance_of(grams, blocks, silent=reason)),
        coupling=block_coupling(grams, blocks=blocks),
        intervals=None if between is None else between(grams, blocks=blocks),
        population=estimated,
    )


def draws_of(grams: TokenGrams) -> tuple[Clusters | None, str | None]:
    """The independent draws that an estimate of the population rests on, or why there is none."""
    try:
        return clusters_of(grams, None, "a summary"), None
    except ValueError as error:
        return None, str(error)


def _known(eigenvalues: Tensor) -> GramKernel:
    """The kernel that has found these already, by `gram_eigh` or by what gives its vectors as well."""
    return checked(gram_kernel(lambda _: eigenvalues, solver="gram_eigh(float64)"))


def interval_method(choice: IntervalMethod) -> Callable[..., Intervals] | None:
    """The function that makes the intervals.

    Raises:
        ValueError: If there is no method of this name.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in _INTERVALS:
        raise ValueError(
            f"intervals expected one of {sorted(_INTERVALS)}, a function (grams, blocks=) -> Intervals or None, "
            f"got intervals={choice!r}"
        )
    return _INTERVALS[choice]


@full_precision()
def spectrum_of_gradients(
    gradients: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    *,
    blocks: Callable[[str], str] = by_layer,
    center: bool = False,
    kernel: RowKernel | None = None,
) -> FisherSpectrum:
    """The spectra of a partition, from per-token gradients already at hand. Cost that of the kernel a block.

    Args:
        gradients: `{name: (N, *shape)}`, or one dict `{name: shape}` a sample.
        blocks: Parameter name → block label.
        center: Whether to subtract the mean row.
        kernel: Gradient matrix → spectrum; `kernels.cheapest()` where None. What another one returns is checked, which
            costs 2 N P min(N, P) more (see sound_spectrum.py).

    Raises:
        ValueError: If there are no gradients, their names or numbers of rows differ, one is not finite, their squares
            vanish, or the kernel returned no spectrum of them.
        TypeError: If the kernel cannot be called like one, or returned something else.

    Example:
        >>> result = spectrum_of_gradients({"weight": torch.tensor([[3.0], [4.0]])})
        >>> result.full.eigenvalues
        tensor([12.5000], dtype=torch.float64)
    """
    rows = {name: rearrange(g, "n ... -> n (...)") for name, g in _stacked(gradients).items()}
    if squares_vanish(sum(float(g.detach().double().square().sum()) for g in rows.values())):
        raise_vanished(max(float(g.abs().max()) for g in rows.values()))

    def asked_for(matrix: Tensor, **context: Any) -> Spectrum:
        if kernel is None:
            return cheapest()(matrix, **context)
        return asked(kernel, matrix, moments=moments_of_rows(matrix), **context)

    def solve(names: Iterable[str]) -> Spectrum:
        block = [rows[name] for name in names]
        if not center:
            return asked_for(torch.cat(block, dim=-1))
        scale = torch.stack([gram_norm(g) for g in block]).sum()  # as ff.gram.summed has it
        return asked_for(torch.cat([g - g.mean(dim=0) for g in block], dim=-1), scale=scale)

    spectra = {label: solve(names) for label, names in partition(rows, blocks).items()}
    full = next(iter(spectra.values())) if len(spectra) == 1 else solve(rows)
    some = next(iter(rows.values()))
    provenance = Provenance(
        unit="row",
        centered=center,
        num_tokens=some.shape[0],
        num_params=sum(g.shape[1] for g in rows.values()),
        blocks=rule_name(blocks),
        dtype=dtype_name(some.dtype),
        device=str(some.device),
        route="gradients given",
        versions=versions(),
    )
    return result_of(spectra, full, provenance)


def _in_unit(grams: TokenGrams, unit: str) -> TokenGrams:
    if unit not in ("token", "sequence"):
        raise ValueError(f"unit expected 'token' or 'sequence', got unit={unit!r}")
    if unit == "token" and grams.unit == "sequence":
        raise ValueError("unit='token' cannot be had from Grams of unit 'sequence'; keep those of the tokens")
    return grams.by_sequence() if unit == "sequence" and grams.unit == "token" else grams


def result_of(spectra: dict[str, Spectrum], full: Spectrum, provenance: Provenance) -> FisherSpectrum:
    """Put together what is known of the blocks and of the full matrix."""
    named = spectra | {apart_from(spectra, "full"): full}
    provenance = replace(
        provenance,
        normalization=NORMALIZATION,
        solver={label: s.solver for label, s in named.items()},
        fallback={label: s.fallback for label, s in named.items() if s.fallback},
        resolution={label: s.resolution.item() for label, s in named.items()},
        approximations=provenance.approximations
        or [f"{label}: {s.solver}" for label, s in named.items() if not s.exact],
    )
    return FisherSpectrum(blocks=spectra, block_diagonal=union(spectra), full=full, provenance=provenance)


def provenance_of(grams: TokenGrams, blocks: Callable[[str], str] | None, *, silent: str | None) -> Provenance:
    """Say what the rows are, and the blocks, and why nothing is said of the population."""
    summed = (grams.provenance.num_summed_tokens or grams.num_units) * grams.tokens.num_targets
    return replace(
        grams.provenance,
        unit=grams.unit,
        centered=grams.centered,
        tokens=grams.fingerprint,
        num_tokens=grams.num_units,
        num_rows=grams.num_rows,
        num_sequences=len(grams.tokens.sequence.unique()),
        clusters=cluster_id(grams),
        mean_loss=(grams.tokens.loss.double().sum() / summed).item(),
        num_params=sum(grams.num_params.values()),
        blocks=grams.provenance.accumulated if blocks is None else rule_name(blocks),
        population=silent,
    )


def _stacked(gradients: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if not isinstance(gradients, Mapping):
        gradients = _stack_samples(list(gradients))
    if not gradients:
        raise ValueError("gradients expected at least one parameter, got none")
    instead = "map a kernel of rows over the stack, as vmap(ff.kernels.svd())(stack)"
    check_not_mapped("spectrum_of_gradients", gradients.values(), instead=instead)
    lengths = {name: (g.shape[0] if g.ndim else None) for name, g in gradients.items()}
    if len(set(lengths.values())) > 1 or not all(lengths.values()):
        raise ValueError(f"gradients expected (N, *shape) with one N >= 1 for all, got N={lengths}")
    for name, g in gradients.items():
        _check_values(name, g)
    return dict(gradients)


def _check_values(name: str, gradient: Tensor) -> None:
    if not gradient.is_floating_point():
        raise ValueError(f"the gradient of {name!r} expected a floating-point dtype, got {gradient.dtype}")
    rows = (~gradient.isfinite()).reshape(gradient.shape[0], -1).any(dim=1).nonzero().flatten().tolist()
    if rows:
        raise ValueError(f"the gradient of {name!r} is not finite in row {rows[0]}; leave that row out")


def _stack_samples(samples: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if not samples:
        raise ValueError("gradients expected at least one sample, got an empty list")
    shapes = [{name: tuple(g.shape) for name, g in sample.items()} for sample in samples]
    for index, shape in enumerate(shapes):
        differing = sorted(dict(shape.items() ^ shapes[0].items()))
        if differing:
            raise ValueError(
                f"sample {index} has other parameters or shapes than sample 0: {differing}; "
                "give each sample all parameters, alike"
            )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
