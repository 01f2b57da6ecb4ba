"""All that a sample says of the population at once: what the estimators share is computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.partitioning import by_layer
from fisherfunc.population.clusters import ClusterLabels, Clusters, clusters_of
from fisherfunc.population.dimension import EffectiveDimension, dimension_of
from fisherfunc.population.estimate import BlockEstimates, Estimate, check_level
from fisherfunc.population.leading import LeadingSums, bracket_of_leading, bracket_of_sums, held_out
from fisherfunc.population.moments import moment_estimates, moments_of
from fisherfunc.population.paired import LeftOut, left_out_of, of_folds
from fisherfunc.population.pairs import full_of, second_moments_of
from fisherfunc.population.rank import left_out_traces, rank_estimate
from fisherfunc.population.second_moments import (
    BlockCoupling,
    SecondMoments,
    coupling_estimate,
    error_estimate,
    participation_ratio_of,
    squared_norm_of,
    trace_of,
)
from fisherfunc.statistics.block_grams import BlockRule, gathered


@dataclass(frozen=True, kw_only=True)
class PopulationSummary:
    """What a sample says of the population that its sequences were drawn from.

    Attributes:
        num_clusters: How many independent clusters of tokens it rests on.
        trace: tr F, of the blocks and `.full`.
        squared_norm: ‖F‖_F².
        participation_ratio: (tr F)²/‖F‖_F².
        coupling: ‖F_ab‖_F² of all pairs of blocks, and their alignments.
        block_diagonal_error: ‖F − F_bd‖_F/‖F‖_F.
        moments: tr F, tr F² and on, to the fourth where there are five clusters.
        leading_eigenvalue: What λ₁ lies between.
        leading_sums: What sums of leading eigenvalues lie between, and each in and out of sample.
        effective_dimension: Σ λ/(λ + κ) over κ, from the smallest κ that the sample resolves.
        effective_rank: What exp(entropy) lies between.
        left_out: Numbers without each cluster, for paired comparisons; None in files of before.
    """

    num_clusters: int
    trace: BlockEstimates
    squared_norm: BlockEstimates
    participation_ratio: BlockEstimates
    coupling: BlockCoupling
    block_diagonal_error: Estimate
    moments: tuple[Estimate, ...]
    leading_eigenvalue: Estimate
    leading_sums: LeadingSums
    effective_dimension: EffectiveDimension
    effective_rank: Estimate
    left_out: LeftOut | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive JSON."""
        plain = {name: value.to_dict() for name, value in vars(self).items() if hasattr(value, "to_dict")}
        moments = [entry.to_dict() for entry in self.moments]
        return {"num_clusters": self.num_clusters, **plain, "moments": moments}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "PopulationSummary":
        """Return what `to_dict` was called on."""
        kinds: dict[str, Any] = {
            "trace": BlockEstimates,
            "squared_norm": BlockEstimates,
            "participation_ratio": BlockEstimates,
            "coupling": BlockCoupling,
            "block_diagonal_error": Estimate,
            "leading_eigenvalue": Estimate,
            "leading_sums": LeadingSums,
            "effective_dimension": EffectiveDimension,
            "effective_rank": Estimate,
        }
        return PopulationSummary(
            num_clusters=content["num_clusters"],
            left_out=LeftOut.from_dict(content["left_out"]) if content.get("left_out") else None,
            moments=tuple(map(Estimate.from_dict, content["moments"])),
            **{name: kind.from_dict(content[name]) for name, kind in kinds.items()},
        )


def summary(
    grams: TokenGrams,
    *,
    blocks: BlockRule = by_layer,
    clusters: ClusterLabels = None,
    level: float = 0.95,
    num_leading: int = 5,
    kappas: Sequence[float] | None = None,
) -> PopulationSummary:
    """Return all estimates of the population. Cost an eigensolve with vectors, of the full matrix, and up to two more.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage of each interval.
        num_leading: How many leading eigenvalues, at most as many as there are rows.
        kappas: Where the effective dimension is wanted; over all that the sample resolves where None.

    Raises:
        ValueError: If there are fewer than three clusters, or the Grams are centred or of sampled coordinates.
    """
    found = clusters_of(grams, clusters, "a summary")
    return summary_of(grams, found, blocks=blocks, level=level, num_leading=num_leading, kappas=kappas)


def summary_of(
    grams: TokenGrams,
    found: Clusters,
    *,
    blocks: BlockRule = by_layer,
    level: float = 0.95,
    num_leading: int = 5,
    kappas: Sequence[float] | None = None,
    eigenpairs: tuple[Float[Tensor, " n"], Float[Tensor, "n n"]] | None = None,
) -> PopulationSummary:
    """Return the same for clusters that are known, those of `clusters_of`; so may be the eigenpairs of K, ascending."""
    check_level(level)
    sums = sums_of(grams, found, blocks=blocks)
    how: dict[str, Any] = {"level": level, "num_leading": num_leading, "kappas": kappas, "eigenpairs": eigenpairs}
    return summary_from(grams, grams.block().double(), found, sums, **how)


def sums_of(grams: TokenGrams, found: Clusters, *, blocks: BlockRule = by_layer) -> tuple[SecondMoments, SecondMoments]:
    """Return all that a summary takes of the Grams of blocks: sums over pairs of distinct clusters, and of folds."""
    parts = gathered(grams, blocks)
    second = second_moments_of(grams, parts, found)
    return second, of_folds(grams, parts, found, second)


def summary_from(
    grams: TokenGrams,
    gram: Float[Tensor, "n n"],
    found: Clusters,
    sums: tuple[SecondMoments, SecondMoments],
    *,
    level: float = 0.95,
    num_leading: int = 5,
    kappas: Sequence[float] | None = None,
    eigenpairs: tuple[Float[Tensor, " n"], Float[Tensor, "n n"]] | None = None,
) -> PopulationSummary:
    """Return the same, from what `sums_of` has of the blocks.

    Args:
        grams: What is known of the Grams of a pass, beside the matrices.
        gram: That of all parameters, in float64.
        found: The clusters.
        sums: Of the blocks.
        level: The nominal coverage of each interval.
        num_leading: How many leading eigenvalues.
        kappas: Where the effective dimension is wanted.
        eigenpairs: Of K, ascending, where they are known.
    """
    second, by_folds = sums
    full = full_of(second)

    def each(of: Any) -> BlockEstimates:
        return BlockEstimates(
            {label: of(second, a, level) for a, label in enumerate(second.labels)}, of(full, 0, level)
        )

    num_params = sum(grams.num_params.values())
    higher = moments_of(gram, found)
    eigenpairs = torch.linalg.eigh(gram) if eigenpairs is None else eigenpairs
    outside = held_out(gram, found, min(num_leading, grams.num_rows), eigenpairs=eigenpairs)
    curve, dimension = dimension_of(grams, gram, eigenpairs, found, kappas, level)
    folds = found.folds()
    traces = left_out_traces(folds.sums(gram.diagonal()), folds.sizes)
    return PopulationSummary(
        num_clusters=found.num_clusters,
        trace=each(trace_of),
        squared_norm=each(squared_norm_of),
        participation_ratio=each(participation_ratio_of),
        coupling=coupling_estimate(second, level),
        block_diagonal_error=error_estimate(second.products, level),
        moments=moment_estimates(higher, level),
        leading_eigenvalue=bracket_of_leading(higher, outside, level),
        leading_sums=bracket_of_sums(outside, higher, level),
        effective_dimension=dimension,
        effective_rank=rank_estimate(curve, higher, traces, num_params=num_params, level=level),
        left_out=left_out_of(by_folds, curve),
    )
