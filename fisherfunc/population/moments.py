"""Moments tr F^k of the population, without bias: from cycles of tokens of k distinct clusters.

With K° the Gram without the blocks of each cluster with itself, e_k the elementary symmetric polynomial and T_s sizes,

    tr F²  ←  tr K°² / (2! e_2(T))
    tr F³  ←  tr K°³ / (3! e_3(T))
    tr F⁴  ←  (tr K°⁴ − 2 Σ_s ‖(K°²)_ss‖² + Σ_{s≠t} tr (K_st K_ts)²) / (4! e_4(T))

The last two terms take out cycles that come back to a cluster. All orders of clusters count, so that their order
changes nothing. What each cluster has a part in is the sum of its own rows, so that leaving it out costs nothing.
Source: Kong and Valiant, "Spectrum estimation from samples", Ann. Statist. 45, 2017 (increasing cycles of rows).
Axis order: rows `(n, m)`, clusters `(s,)`, moments `(k, s)`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.factors.triangle import add_rows
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.population.clusters import ClusterLabels, Clusters, clusters_of
from fisherfunc.population.estimate import Estimate, check_level, jackknifed
from fisherfunc.population.second_moments import trace_estimate
from fisherfunc.records.record import record
from fisherfunc.statistics.resampling.heavy_tail import heavy_moment

ROWS = 256
"""Of temporaries, which stay in the cache."""
ORDERS = {2: "the second moment", 3: "the third moment", 4: "the fourth moment"}


@record()
class Moments:
    """The moments of orders 2 to 4, below the number of clusters, and those without each cluster.

    Attributes:
        values: tr F^k.
        left_out: tr F^k without each cluster.
        parts: What each cluster has a part in.
        traces: tr K_ss, for the first moment.
        sizes: T_s.
    """

    values: Float[Tensor, " k"]
    left_out: Float[Tensor, "k s"]
    parts: Float[Tensor, "k s"]
    traces: Float[Tensor, " s"]
    sizes: Float[Tensor, " s"]


def moments_of(gram: Float[Tensor, "n n"], clusters: Clusters) -> Moments:
    """Return the moments. Cost N³ operations and N² T more, of clusters of T rows.

    Args:
        gram: K, in float64.
        clusters: Of the rows.
    """
    parts = _cycles(gram, clusters)[: min(3, clusters.num_clusters - 2)]
    weights, left_out = _weights(clusters.sizes)
    orders = torch.arange(2, 2 + len(parts), device=gram.device)
    totals = parts.sum(dim=-1)
    return Moments(
        values=totals / weights[: len(parts)],
        left_out=(totals[:, None] - orders[:, None] * parts) / left_out[: len(parts)],
        parts=parts,
        traces=clusters.sums(gram.diagonal()),
        sizes=clusters.sizes,
    )


def _cycles(gram: Float[Tensor, "n n"], clusters: Clusters) -> Float[Tensor, "k s"]:
    """The sums over cycles of 2, 3 and 4 distinct clusters that begin in each cluster."""
    group, off = clusters.group, gram.clone()
    for rows in clusters.rows():
        off[rows[:, None], rows] = 0.0
    square = torch.zeros_like(off)
    add_rows(square, off)  # of a symmetric matrix: half of a product
    begun = gram.new_empty(3, len(gram))
    for some in torch.arange(len(gram), device=gram.device).split(ROWS):
        tile, squared = off[some], square[some]
        begun[0, some], begun[1, some] = tile.square().sum(dim=-1), (tile * squared).sum(dim=-1)
        begun[2, some] = squared.masked_fill(group[some, None] == group, 0.0).square().sum(dim=-1)
    sums = clusters.sums(begun)
    alike = [torch.stack(rows) for rows in _of_one_size(clusters.rows())]
    for s, rows in enumerate(clusters.rows()):
        between = off[:, rows]
        inner = square[rows][:, rows]
        sums[2] -= clusters.sums(((between @ inner) * between).sum(dim=-1))
        sums[2, s] += torch.stack([_squared_products(between[index]) for index in alike]).sum()
    return sums


def _of_one_size(clusters: list[Int[Tensor, " m"]]) -> list[list[Int[Tensor, " m"]]]:
    """The rows of clusters, those of one size together."""
    found: dict[int, list[Tensor]] = {}
    for rows in clusters:
        found.setdefault(len(rows), []).append(rows)
    return list(found.values())


def _squared_products(blocks: Float[Tensor, "c n m"]) -> Float[Tensor, ""]:
    """Σ ‖K_st K_ts‖_F² of blocks K_ts, by the smaller of the two products."""
    narrow = blocks if blocks.shape[1] <= blocks.shape[2] else blocks.mT
    return (narrow @ narrow.mT).square().sum()


def _weights(sizes: Float[Tensor, " s"]) -> tuple[Float[Tensor, " k"], Float[Tensor, "k s"]]:
    """The weights k! e_k of the sizes for k = 2, 3, 4, and of the sizes without each."""
    powers = torch.stack([sizes.pow(k).sum() for k in range(1, 5)])
    polynomials = [torch.ones_like(powers[0])]
    for k in range(1, 5):  # Newton's identities
        terms = [(-1) ** (i - 1) * polynomials[k - i] * powers[i - 1] for i in range(1, k + 1)]
        polynomials.append(torch.stack(terms).sum() / k)
    without = [torch.ones_like(sizes)]
    for k in range(1, 5):
        without.append(polynomials[k] - sizes * without[k - 1])
    factorials = torch.tensor([2.0, 6.0, 24.0], dtype=sizes.dtype, device=sizes.device)
    return factorials * torch.stack(polynomials[2:]), factorials[:, None] * torch.stack(without[2:])


def moment_estimates(found: Moments, level: float) -> tuple[Estimate, ...]:
    """Return tr F, tr F² and on."""
    higher = (
        jackknifed(
            value,
            left_out,
            level=level,
            limits=(0.0, torch.inf),
            method=f"cycles of {order} distinct clusters, jackknife",
            warning=heavy_moment(found.traces, parts, found.sizes, ORDERS[order]),
        )
        for order, value, left_out, parts in zip(ORDERS, found.values, found.left_out, found.parts, strict=False)
    )
    return (trace_estimate(found.traces, found.sizes, level), *higher)


def moments(
    grams: TokenGrams, *, num: int = 4, clusters: ClusterLabels = None, level: float = 0.95
) -> tuple[Estimate, ...]:
    """Return tr F, tr F², … tr F^num of the population, each unbiased. Cost N³ operations.

    Where norms have heavy tails the intervals are too short, and warn. A moment is positive; where few sequences give
    less than zero, the estimate is 0.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        num: How many moments, at most 4.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage.

    Raises:
        ValueError: If there are fewer than three clusters or no more than `num` − 1, `num` is not from 1 to 4, or the
            Grams are centred or of sampled coordinates.
    """
    check_level(level)
    if num not in (1, 2, 3, 4):
        raise ValueError(f"num expected 1 to 4 moments, got num={num!r}: the error of higher ones has no bound in use")
    found = clusters_of(grams, clusters, "a moment")
    if found.num_clusters <= num:
        raise ValueError(
            f"num={num} moments and their errors need at least {num + 1} clusters, got {found.num_clusters}; ask for "
            f"num={found.num_clusters - 1}, or pass over more sequences"
        )
    return moment_estimates(moments_of(grams.block().double(), found), level)[:num]
