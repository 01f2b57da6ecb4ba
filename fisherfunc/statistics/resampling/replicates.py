"""Spectra of reweighted sequences: what bootstrap and jackknife replicates are, from the Grams alone.

A replicate weights the rows of sequence s by w_s ≥ 0. With N* = Σ_s w_s T_s its matrix is

    F* = (1/N*) Σ_n w_{s(n)} g_n g_nᵀ,    of the nonzero eigenvalues of (1/N*) D K D, D = diag(√w)

A sequence drawn m times has w = m, one left out w = 0. Rows of weight zero are cut, and where P is smaller still the
eigenproblem is that of P × P, so that no solve is larger than the rank. Axis order: replicates `(r,)`, rows `(n,)`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.gram import regrouped_matrix
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.kernels import gram_eigh
from fisherfunc.linalg.lifting import solved
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.linalg.union import union
from fisherfunc.records.record import record
from fisherfunc.statistics.block_grams import Sequences, num_params
from fisherfunc.statistics.resampling.heavy_tail import heavy_tail

BATCH_BYTES = 2**28


@record(static=("heavy",))
class Replicate:
    """One matrix of the sample and of each replicate.

    Attributes:
        sample: The spectrum of the sample.
        traces: Of the sample, and of each replicate.
        spectra: Likewise, a stack; of the sample alone where no one asks for others.
        heavy: Why an interval of the trace would be too short; None where it would not.
    """

    sample: Spectrum
    traces: Float[Tensor, " r"]
    spectra: Spectrum
    heavy: str | None


@record()
class Replicates:
    """The matrices of a partition, of the sample and of each replicate."""

    blocks: Mapping[str, Replicate]
    block_diagonal: Replicate
    full: Replicate


def replicates_of(
    grams: TokenGrams,
    blocks: Mapping[str, tuple[str, ...]],
    sequences: Sequences,
    weights: Float[Tensor, "r s"],
    *,
    solve: bool,
) -> Replicates:
    """Return what intervals are made of. Cost of traces nothing, of spectra as `replicate_spectra`.

    Args:
        grams: The Grams; of centred ones each replicate is centred at its own mean.
        blocks: The Grams that each block is the sum of.
        sequences: Of the rows.
        weights: Of the sequences.
        solve: Whether the spectra of the replicates are wanted.
    """
    weights = weights.to(sequences.sizes)
    spectra, together, full = replicate_spectra(grams, blocks, sequences, weights if solve else weights[:0])

    def replicate(stack: Spectrum, names: Iterable[str]) -> Replicate:
        first = replace(
            stack,
            eigenvalues=stack.eigenvalues[0],
            resolution=stack.resolution[0],
            negative_part=stack.negative_part[0],
        )
        gram = grams.block(names).double()
        own = gram.new_zeros(sequences.num_sequences).index_add(0, sequences.group, gram.diagonal())
        return Replicate(
            sample=first,
            traces=_traces(gram, own, sequences, weights, centered=grams.centered),
            spectra=stack,
            heavy=heavy_tail(own, sequences.sizes, "the trace"),
        )

    return Replicates(
        blocks={label: replicate(stack, blocks[label]) for label, stack in spectra.items()},
        block_diagonal=replicate(together, grams.grams),
        full=replicate(full, grams.grams),
    )


def _traces(
    gram: Float[Tensor, "n n"],
    own: Float[Tensor, " s"],
    sequences: Sequences,
    weights: Float[Tensor, "r s"],
    *,
    centered: bool,
) -> Float[Tensor, " q"]:
    """Σ_n w_{s(n)} ‖g_n‖²/N* of the sample, then of replicates; centred, less ‖Σ_n w_{s(n)} g_n‖²/N*²."""
    weights = torch.cat([torch.ones_like(sequences.sizes)[None], weights])
    totals = weights @ sequences.sizes
    found = weights @ own / totals
    if not centered:
        return found
    between = regrouped_matrix(gram, sequences.group, sequences.num_sequences)
    return found - einsum(weights, between, weights, "q s, s t, q t -> q") / totals.square()


def replicate_spectra(
    grams: TokenGrams, blocks: Mapping[str, tuple[str, ...]], sequences: Sequences, weights: Float[Tensor, "r s"]
) -> tuple[dict[str, Spectrum], Spectrum, Spectrum]:
    """The spectra of the sample, first of the stack, and of each replicate: by block, block-diagonal and full.

    Cost a float64 eigensolve of min(rows with weight, P) for each replicate and block. A replicate's resolution is that
    of the sample, relative to the largest eigenvalue.

    Args:
        grams: The Grams; of centred ones each replicate is centred at its own mean.
        blocks: The Grams that each block is the sum of.
        sequences: Of the rows.
        weights: Of the sequences.
    """
    rows = _row_weights(sequences, weights.to(sequences.sizes))

    def solve(names: tuple[str, ...]) -> Spectrum:
        gram = grams.summed(names)
        own = gram.matrix.double()
        values = _eigenvalues(own, rows, num_params=num_params(grams, names), center=grams.centered) / gram.num_units
        return _stacked(solved(gram_eigh(), gram), values)

    spectra = {label: solve(names) for label, names in blocks.items()}
    full = next(iter(spectra.values())) if len(spectra) == 1 else solve(tuple(grams.grams))
    return spectra, union(spectra), full


def _row_weights(sequences: Sequences, weights: Float[Tensor, "r s"]) -> Float[Tensor, "r n"]:
    """w_{s(n)} N/N*: so scaled, every replicate is divided by N."""
    total = sequences.sizes.sum()
    return (weights * (total / (weights @ sequences.sizes))[:, None])[:, sequences.group]


def _stacked(sample: Spectrum, values: Float[Tensor, "r k"]) -> Spectrum:
    """The eigenvalues of replicates, behind those of the sample."""
    count = sample.eigenvalues.shape[-1]
    padded = torch.nn.functional.pad(values, (0, max(0, count - values.shape[-1])))[:, :count]
    stack = torch.cat([sample.eigenvalues[None], padded.clamp(min=0)])
    largest = sample.eigenvalues[0]
    floor = torch.where(largest > 0, sample.resolution / largest, 0.0) * stack[:, 0]
    return replace(sample, eigenvalues=stack, resolution=floor, negative_part=torch.zeros_like(floor))


def _eigenvalues(
    gram: Float[Tensor, "n n"], weights: Float[Tensor, "r n"], *, num_params: int, center: bool
) -> Float[Tensor, "r k"]:
    """The leading eigenvalues of D K D for each row of weights, largest first."""
    if len(weights) == 0:
        return gram.new_zeros(0, 1)
    counts = (weights > 0).sum(dim=1)
    order = counts.argsort()
    narrow = _narrow_rows(gram, num_params) if num_params < int(counts.min()) else None
    found = gram.new_zeros(len(weights), num_params if narrow is not None else int(counts.max()))
    for some, size in _batches(order, counts, found.shape[1]):
        if narrow is not None:
            matrices = _covariances(narrow, weights[some], center=center)
        else:
            matrices = _submatrices(gram, weights[some], size, center=center)
        found[some, : matrices.shape[-1]] = torch.linalg.eigvalsh(matrices).flip(-1)
    return found


def _batches(
    order: Int[Tensor, " r"], counts: Int[Tensor, " r"], largest: int
) -> Iterator[tuple[Int[Tensor, " b"], int]]:
    """Replicates of similar size that fit the memory together, with the size of the largest among them."""
    for some in order.split(max(1, BATCH_BYTES // (4 * 8 * largest**2))):
        yield some, int(counts[some].max())


def _narrow_rows(gram: Float[Tensor, "n n"], num_params: int) -> Float[Tensor, "n p"]:
    """Rows with this Gram, of P columns: K = L Lᵀ."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, -num_params:] * values[-num_params:].clamp(min=0).sqrt()


def _covariances(rows: Float[Tensor, "n p"], weights: Float[Tensor, "b n"], *, center: bool) -> Float[Tensor, "b p p"]:
    """Σ_n w_n l_n l_nᵀ, where asked for of the rows less their weighted mean."""
    scaled = weights.sqrt()[:, :, None] * rows
    matrices = einsum(scaled, scaled, "b n p, b n q -> b p q")
    if center:
        means = weights @ rows
        matrices -= einsum(means, means, "b p, b q -> b p q") / weights.sum(dim=1)[:, None, None]
    return matrices


def _submatrices(
    gram: Float[Tensor, "n n"], weights: Float[Tensor, "b n"], size: int, *, center: bool
) -> Float[Tensor, "b m m"]:
    """D K D of the `size` rows of largest weight; centred, (I − 1pᵀ) K (I − p1ᵀ) for K, p the weights' shares."""
    weights, index = weights.topk(size, dim=1)
    matrices = gram[index[:, :, None], index[:, None, :]]
    if center:
        means = einsum(matrices, weights / weights.sum(dim=1, keepdim=True), "b n m, b m -> b n")
        overall = einsum(means, weights / weights.sum(dim=1, keepdim=True), "b n, b n -> b")
        matrices = matrices - means[:, :, None] - means[:, None, :] + overall[:, None, None]
    root = weights.sqrt()
    return root[:, :, None] * matrices * root[:, None, :]
