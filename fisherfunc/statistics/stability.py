"""Do two halves of the sequences show the same spectrum, and the same leading directions? From the Grams alone."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfunc.linalg.gram import Gram, selected
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.lifting import GramKernel, gram_kernel, solved
from fisherfunc.linalg.metrics import numerical_rank
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.records.record import record
from fisherfunc.statistics.block_grams import BlockRule, Sequences, gathered, several_sequences


@record(static=("num_leading",))
class Halves:
    """What two disjoint halves of the sequences show of one matrix, for several ways to halve them.

    Attributes:
        first: The spectrum of one half, of the first split.
        second: The spectrum of the other.
        overlaps: ‖V_1ᵀ V_2‖_F²/k of the leading k-dimensional subspaces, of each split: 1 where they are the same, 0
            where orthogonal.
        num_leading: k: as asked for, or fewer, where a half resolves fewer eigenvalues; 0 where one is zero.
        participation_ratio: (tr F)²/‖F‖² of the population, from pairs of distinct sequences; NaN of centred rows.
    """

    first: Spectrum
    second: Spectrum
    overlaps: Float[Tensor, " r"]
    num_leading: int
    participation_ratio: Float[Tensor, ""]

    @property
    def overlap(self) -> Float[Tensor, ""]:
        """The mean over splits."""
        return self.overlaps.mean()

    @property
    def spread(self) -> Float[Tensor, ""]:
        """The standard deviation over splits, which share their sequences; NaN of one split."""
        return self.overlaps.std() if len(self.overlaps) > 1 else torch.full_like(self.overlaps[0], torch.nan)

    @property
    def chance(self) -> float:
        """Return k over the participation ratio, at most 1: mean overlap of k gradients of each half.

        For independent gradients of norm one E⟨g, g'⟩² = ‖F‖²/(tr F)². Directions of the sample that are no more than
        single tokens overlap so; k/P, that of uniformly random ones, is thousands of times less.
        """
        return float((self.num_leading / self.participation_ratio).clamp(max=1))


@record()
class SplitHalves:
    """Two halves of the sequences, of every matrix.

    Attributes:
        blocks: {label: what they show of the block}.
        full: What they show of the full matrix.
    """

    blocks: Mapping[str, Halves]
    full: Halves


def split_halves(
    grams: TokenGrams, *, blocks: BlockRule = None, num_leading: int = 5, num_splits: int = 5, seed: int = 0
) -> SplitHalves:
    """Spectra of two disjoint halves of the sequences, and the overlap of their leading subspaces in parameter space.

    With K_i = U_i Λ_i U_iᵀ the Gram of half i, its leading eigenvectors are V_i = G_iᵀ U_i Λ_i^{-1/2}, so that

        V_1ᵀ V_2 = Λ_1^{-1/2} U_1ᵀ K_12 U_2 Λ_2^{-1/2},    overlap = ‖V_1ᵀ V_2‖_F²/k

    with K_12 the Gram between the halves: gradients are not needed. Cost two eigendecompositions of N/2 rows a block
    and split.

    Args:
        grams: The Grams of a pass; of centred ones each half has its own mean subtracted.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by, or `by_layer`.
        num_leading: k, the dimension of the subspaces.
        num_splits: How often the sequences are halved.
        seed: Of the choice of the halves.

    Raises:
        ValueError: If there is one sequence only, or `num_leading` or `num_splits` is less than 1.
    """
    for name, value in (("num_leading", num_leading), ("num_splits", num_splits)):
        if value < 1:
            raise ValueError(f"{name} expected at least 1, got {name}={value!r}")
    sequences = several_sequences(grams, "a split into halves")
    generator = torch.Generator().manual_seed(seed)
    splits = [_first_half(sequences, generator) for _ in range(num_splits)]

    def halves(names: tuple[str, ...]) -> Halves:
        gram = grams.summed(names)
        gram = replace(gram, matrix=gram.matrix.double())
        parts = [_parted(grams, gram, chosen) for chosen in splits]
        k = min(
            num_leading, *(int(numerical_rank(half.spectrum)) for part in parts for half in (part.first, part.second))
        )
        return Halves(
            first=parts[0].first.spectrum,
            second=parts[0].second.spectrum,
            overlaps=torch.stack([_overlap(part, k) for part in parts]),
            num_leading=k,
            participation_ratio=_participation_ratio(gram.matrix, sequences, centered=grams.centered),
        )

    return SplitHalves(
        blocks={label: halves(names) for label, names in gathered(grams, blocks).items()},
        full=halves(tuple(grams)),
    )


def _first_half(sequences: Sequences, generator: torch.Generator) -> Bool[Tensor, " n"]:
    """The rows of half of the sequences."""
    order = torch.randperm(sequences.num_sequences, generator=generator, device="cpu")
    in_first = torch.zeros(sequences.num_sequences, dtype=torch.bool, device="cpu")
    in_first[order[: sequences.num_sequences // 2]] = True
    return in_first.to(sequences.group.device)[sequences.group]


@record()
class _Half:
    """The spectrum of one half, and the eigenpairs of its Gram, largest first."""

    spectrum: Spectrum
    values: Float[Tensor, " m"]
    vectors: Float[Tensor, "m m"]


@record()
class _Parted:
    """Two halves, and the Gram between them."""

    first: _Half
    second: _Half
    between: Float[Tensor, "m l"]


def _parted(grams: TokenGrams, gram: Gram, chosen: Bool[Tensor, " n"]) -> _Parted:
    if grams.centered:
        gram = replace(gram, matrix=_centred_apart(gram.matrix, chosen))

    def half(mask: Bool[Tensor, " n"]) -> _Half:
        own = selected(gram, mask)
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(own.matrix))
        return _Half(spectrum=solved(_lifted(values), own), values=values, vectors=vectors)

    return _Parted(first=half(chosen), second=half(~chosen), between=gram.matrix[chosen][:, ~chosen])


def _overlap(part: _Parted, k: int) -> Float[Tensor, ""]:
    """NaN of no directions."""
    first, second = part.first, part.second
    cross = first.vectors[:, :k].mT @ part.between @ second.vectors[:, :k]
    cross = cross / (first.values[:k, None] * second.values[:k]).sqrt()
    return cross.square().sum() / k if k else torch.full_like(part.between[0, 0], torch.nan)


def _participation_ratio(gram: Float[Tensor, "n n"], sequences: Sequences, *, centered: bool) -> Float[Tensor, ""]:
    """Σ_{s≠t} tr K_ss tr K_tt / Σ_{s≠t} ‖K_st‖_F², from 1: of the population (see `ff.population`)."""
    group = sequences.group
    traces = gram.new_zeros(sequences.num_sequences).index_add(0, group, gram.diagonal())
    between = gram.masked_fill(group[:, None] == group, 0.0).square().sum()
    found = ((traces.sum().square() - traces.square().sum()) / between).clamp(min=1)
    return torch.full_like(found, torch.nan) if centered else found


def _lifted(values: Tensor) -> GramKernel:
    """The kernel that gives the spectrum of eigenvalues that are known."""
    return gram_kernel(lambda _: values, solver="eigh(float64)")


def _centred_apart(gram: Float[Tensor, "n n"], chosen: Tensor) -> Float[Tensor, "n n"]:
    """The Gram of the rows less the mean of their own half."""
    shares = torch.stack([mask / mask.sum() for mask in (chosen.to(gram), (~chosen).to(gram))])
    means = shares[(~chosen).long()]  # row n averages over its half
    half = gram - means @ gram
    return half - half @ means.mT
