"""Do two halves of the sequences show the same spectrum, and the same leading directions? From the Grams alone."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.gram import Gram, selected
from fisherfunc.linalg.lifting import GramKernel, gram_kernel, solved
from fisherfunc.linalg.metrics import numerical_rank
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.linalg.token_grams import TokenGrams
from fisherfunc.records.record import record
from fisherfunc.statistics.block_grams import BlockRule, gathered, num_params, several_sequences


@record(static=("num_leading", "num_params"))
class Halves:
    """What two disjoint halves of the sequences show of one matrix.

    Attributes:
        first: The spectrum of one half.
        second: The spectrum of the other.
        overlap: ‖V_1ᵀ V_2‖_F²/k of the leading k-dimensional subspaces: 1 where they are the same, 0 where orthogonal.
        num_leading: k: as asked for, or fewer, where a half resolves fewer eigenvalues; 0 where one is zero.
        num_params: P; random subspaces would overlap by k/P.
    """

    first: Spectrum
    second: Spectrum
    overlap: Float[Tensor, ""]
    num_leading: int
    num_params: int

    @property
    def chance(self) -> float:
        """k/P, the mean overlap of random subspaces."""
        return self.num_leading / self.num_params


@record()
class SplitHalves:
    """Two halves of the sequences, of every matrix.

    Attributes:
        blocks: {label: what they show of the block}.
        full: What they show of the full matrix.
    """

    blocks: Mapping[str, Halves]
    full: Halves


def split_halves(grams: TokenGrams, *, blocks: BlockRule = None, num_leading: int = 5, seed: int = 0) -> SplitHalves:
    """Spectra of two disjoint halves of the sequences, and the overlap of their leading subspaces in parameter space.

    With K_i = U_i Λ_i U_iᵀ the Gram of half i, its leading eigenvectors are V_i = G_iᵀ U_i Λ_i^{-1/2}, so that

        V_1ᵀ V_2 = Λ_1^{-1/2} U_1ᵀ K_12 U_2 Λ_2^{-1/2},    overlap = ‖V_1ᵀ V_2‖_F²/k

    with K_12 the Gram between the halves: gradients are not needed. Cost two eigendecompositions of N/2 rows a block.

    Args:
        grams: The Grams of a pass; of centred ones each half has its own mean subtracted.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by, or `by_layer`.
        num_leading: k, the dimension of the subspaces.
        seed: Of the choice of the halves.

    Raises:
        ValueError: If there is one sequence only, or `num_leading` is less than 1.
    """
    if num_leading < 1:
        raise ValueError(f"num_leading expected at least 1, got num_leading={num_leading!r}")
    sequences = several_sequences(grams, "a split into halves")
    order = torch.randperm(sequences.num_sequences, generator=torch.Generator().manual_seed(seed), device="cpu")
    in_first = torch.zeros(sequences.num_sequences, dtype=torch.bool, device="cpu")
    in_first[order[: sequences.num_sequences // 2]] = True
    chosen = in_first.to(sequences.group.device)[sequences.group]

    def halves(names: tuple[str, ...]) -> Halves:
        gram = grams.summed(names)
        matrix = gram.matrix.double()
        matrix = _centred_apart(matrix, chosen) if grams.centered else matrix
        return _halves(replace(gram, matrix=matrix), chosen, num_leading, num_params(grams, names))

    return SplitHalves(
        blocks={label: halves(names) for label, names in gathered(grams, blocks).items()},
        full=halves(tuple(grams)),
    )


def _halves(gram: Gram, chosen: Tensor, num_leading: int, size: int) -> Halves:
    found = []
    for mask in (chosen, ~chosen):
        own = selected(gram, mask)
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(own.matrix))
        found.append((solved(_lifted(values), own), values, vectors))
    (first, values_1, vectors_1), (second, values_2, vectors_2) = found
    k = min(num_leading, int(numerical_rank(first)), int(numerical_rank(second)))
    cross = vectors_1[:, :k].mT @ gram.matrix[chosen][:, ~chosen] @ vectors_2[:, :k]
    between = cross / (values_1[:k, None] * values_2[:k]).sqrt()
    overlap = between.square().sum() / k if k else torch.full_like(gram.matrix[0, 0], torch.nan)
    return Halves(first=first, second=second, overlap=overlap, num_leading=k, num_params=size)


def _lifted(values: Tensor) -> GramKernel:
    """The kernel that gives the spectrum of eigenvalues that are known."""
    return gram_kernel(lambda _: values, solver="eigh(float64)")


def _centred_apart(gram: Float[Tensor, "n n"], chosen: Tensor) -> Float[Tensor, "n n"]:
    """The Gram of the rows less the mean of their own half."""
    shares = torch.stack([mask / mask.sum() for mask in (chosen.to(gram), (~chosen).to(gram))])
    means = shares[(~chosen).long()]  # row n averages over its half
    half = gram - means @ gram
    return half - half @ means.mT
