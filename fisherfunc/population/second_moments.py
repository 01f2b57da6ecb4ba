"""Second moments of the population, without bias: from pairs of tokens of distinct sequences alone.

With K_a,st the block of the Gram of block a between clusters s and t, T_s tokens each,

    ‖F_ab‖_F²  ←  Σ_{s≠t} ⟨K_a,st, K_b,st⟩ / Σ_{s≠t} T_s T_t
    (tr F)²    ←  Σ_{s≠t} tr K_ss tr K_tt  / Σ_{s≠t} T_s T_t

as E K_st has no term of a token with itself. Intervals: delete-one jackknife, for which Σ_{t≠s} ⟨K_a,st, K_b,st⟩ of
each s is all that is needed. No eigensolve; one product of N² B² operations for B blocks.
Source: Hoeffding, "A class of statistics with asymptotically normal distribution", Ann. Math. Statist. 19, 1948; El
Karoui and Purdom, arXiv 1608.00948, on why resampling a spectrum does not do it.
Axis order: blocks `(b, c)`, clusters `(s,)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.partitioning import by_layer
from fisherfunc.population.clusters import ClusterLabels, clusters_of
from fisherfunc.population.estimate import (
    BlockEstimates,
    Estimate,
    check_level,
    jackknifed,
    of_square,
)
from fisherfunc.population.pairs import (
    Pairs,
    SecondMoments,
    entry_of,
    outer_pairs,
    own_of,
    second_moments_of,
    summed,
)
from fisherfunc.statistics.block_grams import BlockRule, gathered
from fisherfunc.statistics.resampling.heavy_tail import heavy_moment, heavy_tail

PAIRS = "pairs of distinct clusters, jackknife"
Matrix = tuple[tuple[Estimate, ...], ...]


def trace_estimate(traces: Float[Tensor, " s"], sizes: Float[Tensor, " s"], level: float) -> Estimate:
    """Return tr F = Σ_s tr K_ss / Σ_s T_s."""
    left_out = (traces.sum() - traces) / (sizes.sum() - sizes)
    return jackknifed(
        traces.sum() / sizes.sum(),
        left_out,
        level=level,
        limits=(0.0, torch.inf),
        method="mean over clusters, jackknife",
        warning=heavy_tail(traces, sizes, "the trace"),
    )


def trace_of(moments: SecondMoments, block: int, level: float) -> Estimate:
    """Return tr F of a block."""
    return trace_estimate(moments.traces[block], moments.sizes, level)


def squared_norm_of(moments: SecondMoments, block: int, level: float) -> Estimate:
    """Return ‖F‖_F² of a block."""
    products = entry_of(moments.products, block, block)
    return jackknifed(
        products.total / moments.weights.total,
        products.left_out / moments.weights.left_out,
        level=level,
        limits=(0.0, torch.inf),
        method=PAIRS,
        warning=_heavy(moments, block),
    )


def _heavy(moments: SecondMoments, block: int) -> str | None:
    products = entry_of(moments.products, block, block)
    return heavy_moment(moments.traces[block], products.of, moments.sizes, "the squared norm")


def participation_ratio_of(moments: SecondMoments, block: int, level: float) -> Estimate:
    """Return (tr F)²/‖F‖_F² of a block, from 1 to P."""
    products, squared_trace = entry_of(moments.products, block, block), outer_pairs(moments.traces[block])
    return jackknifed(
        squared_trace.total / products.total,
        squared_trace.left_out / products.left_out,
        level=level,
        limits=(1.0, float(moments.num_params[block])),
        method=PAIRS,
    )


def error_estimate(products: Pairs, level: float) -> Estimate:
    """Return ‖F − F_bd‖_F/‖F‖_F from the products of all pairs of blocks."""
    own, all_pairs = own_of(products), summed(products)
    square = jackknifed(
        1 - own.total / all_pairs.total,
        1 - own.left_out / all_pairs.left_out,
        level=level,
        limits=(0.0, 1.0),
        method=PAIRS,
        log=False,
    )
    return of_square(square)


def coupling_estimate(moments: SecondMoments, level: float) -> "BlockCoupling":
    """Return the norms and alignments of all blocks of F.

    Between two blocks both may be zero, and their estimates less: the interval is none of the logarithm there.
    """
    products, weights, blocks = moments.products, moments.weights, range(len(moments.labels))
    own = [entry_of(products, a, a) for a in blocks]
    warnings = [_heavy(moments, a) for a in blocks]

    def norm(a: int, b: int) -> Estimate:
        pairs = entry_of(products, a, b)
        return jackknifed(
            pairs.total / weights.total,
            pairs.left_out / weights.left_out,
            level=level,
            limits=(0.0, torch.inf),
            method=PAIRS,
            warning=warnings[a] or warnings[b],
            log=a == b,
        )

    def alignment(a: int, b: int) -> Estimate:
        pairs = entry_of(products, a, b)
        scale, scales = (own[a].total * own[b].total).sqrt(), (own[a].left_out * own[b].left_out).sqrt()
        value, left_out = pairs.total / scale, pairs.left_out / scales
        if a == b:  # no round-off around one
            value, left_out = value / value, left_out / left_out
        return jackknifed(value, left_out, level=level, limits=(0.0, 1.0), method=PAIRS, log=False)

    def symmetric(entry: Callable[[int, int], Estimate]) -> Matrix:
        upper = {(a, b): entry(a, b) for a in blocks for b in blocks if a <= b}
        return tuple(tuple(upper[min(a, b), max(a, b)] for b in blocks) for a in blocks)

    return BlockCoupling(labels=moments.labels, squared_norms=symmetric(norm), alignment=symmetric(alignment))


@dataclass(frozen=True, kw_only=True)
class BlockCoupling:
    """The squared norms of the blocks of the population's F, and how the blocks hang together.

    Attributes:
        labels: Of the blocks, in the order of the rows and columns.
        squared_norms: ‖F_ab‖_F².
        alignment: ‖F_ab‖_F²/(‖F_aa‖_F ‖F_bb‖_F), from 0 to 1.
    """

    labels: tuple[str, ...]
    squared_norms: Matrix
    alignment: Matrix

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive JSON."""
        return {
            "labels": list(self.labels),
            "squared_norms": [[entry.to_dict() for entry in row] for row in self.squared_norms],
            "alignment": [[entry.to_dict() for entry in row] for row in self.alignment],
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "BlockCoupling":
        """Return what `to_dict` was called on."""
        matrices = {
            name: tuple(tuple(map(Estimate.from_dict, row)) for row in content[name])
            for name in ("squared_norms", "alignment")
        }
        return BlockCoupling(labels=tuple(content["labels"]), **matrices)


def squared_norm(
    grams: TokenGrams, *, blocks: BlockRule = by_layer, clusters: ClusterLabels = None, level: float = 0.95
) -> BlockEstimates:
    """Return ‖F‖_F² of the population, unbiased, from pairs of tokens of distinct clusters. Cost N² operations a block.

    Its interval is too short where norms have heavy tails, as those of trained models have, and then warns: the
    largest sequences are not in the sample. Ratios of moments do not suffer from it.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage.

    Returns:
        Those of the blocks by label, with `.full`.

    Raises:
        ValueError: If there are fewer than three clusters, or the Grams are centred or of sampled coordinates.

    Example:
        >>> from fisherfunc.testing import clustered_grams
        >>> grams = clustered_grams([3.0, 1.0], num_sequences=40, num_tokens=5, correlation=0.3, seed=0)
        >>> found = squared_norm(grams).full  # of the population: 3² + 1²
        >>> found.low < 10 < found.high
        True
    """
    return _each(grams, blocks, clusters, level, squared_norm_of, "the squared norm")


def participation_ratio(
    grams: TokenGrams, *, blocks: BlockRule = by_layer, clusters: ClusterLabels = None, level: float = 0.95
) -> BlockEstimates:
    """Return (tr F)²/‖F‖_F² of the population, numerator and denominator unbiased. Cost as `squared_norm`.

    The participation ratio of a sample is below its number of tokens, whatever that of the population is. Of a zero
    matrix, or of sequences whose gradients are orthogonal, there is no estimate, and the interval is the range, 1 to P.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage.

    Returns:
        Those of the blocks by label, with `.full`.

    Raises:
        ValueError: If there are fewer than three clusters, or the Grams are centred or of sampled coordinates.
    """
    return _each(grams, blocks, clusters, level, participation_ratio_of, "the participation ratio")


def block_coupling(
    grams: TokenGrams, *, blocks: BlockRule = by_layer, clusters: ClusterLabels = None, level: float = 0.95
) -> BlockCoupling:
    """Return ‖F_ab‖_F² of all pairs of blocks of the population, and their alignments. Cost 2 N² B² operations.

    The alignment of samples counts each token with itself, and is far too large where norms differ (0.89 where that of
    the text is 0.38); this is the debiased kernel alignment.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage.

    Raises:
        ValueError: If there are fewer than three clusters, or the Grams are centred or of sampled coordinates.
    """
    check_level(level)
    found = clusters_of(grams, clusters, "the coupling of blocks")
    return coupling_estimate(second_moments_of(grams, gathered(grams, blocks), found), level)


def block_diagonal_error(
    grams: TokenGrams, *, blocks: BlockRule = by_layer, clusters: ClusterLabels = None, level: float = 0.95
) -> Estimate:
    """Return ‖F − F_bd‖_F/‖F‖_F of the population: what the block-diagonal matrix leaves out. Cost as `block_coupling`.

    Its square is a difference of unbiased second moments over another; where that is negative, the error is 0.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        blocks: Parameter name → block label; where None, the blocks that the Grams were accumulated by.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage.

    Raises:
        ValueError: If there are fewer than three clusters, or the Grams are centred or of sampled coordinates.
    """
    check_level(level)
    found = clusters_of(grams, clusters, "the block-diagonal error")
    return error_estimate(second_moments_of(grams, gathered(grams, blocks), found).products, level)


def _each(
    grams: TokenGrams,
    blocks: BlockRule,
    clusters: ClusterLabels,
    level: float,
    of: Callable[[SecondMoments, int, float], Estimate],
    what: str,
) -> BlockEstimates:
    """The estimates of the blocks and of the full matrix, one after another: no products of two blocks are needed."""
    check_level(level)
    found = clusters_of(grams, clusters, what)

    def one(label: str, names: tuple[str, ...]) -> Estimate:
        return of(second_moments_of(grams, {label: names}, found), 0, level)

    each = {label: one(label, names) for label, names in gathered(grams, blocks).items()}
    return BlockEstimates(each, one("full", tuple(grams)))
