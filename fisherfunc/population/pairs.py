"""Sums over pairs of distinct clusters: all that second moments and their jackknife are made of.

Axis order: blocks `(b, c)`, clusters `(s,)`, rows `(n, m)`.
"""

from collections.abc import Mapping

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.grams.divided import rows_here, total
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.population.clusters import Clusters
from fisherfunc.records.record import record
from fisherfunc.statistics.block_grams import num_params

TILE = 2**21
"""Numbers of all blocks' Grams that are held at once: 16 MB, which allocators keep. Of 256 MB, pages that were new each
time took three quarters of the whole."""


@record()
class Pairs:
    """A sum over ordered pairs of distinct clusters, Σ_{s≠t} m_st.

    Attributes:
        total: Σ_{s≠t} m_st.
        of: Σ_{t≠s} m_st for each s.
    """

    total: Float[Tensor, "*stack"]
    of: Float[Tensor, "*stack s"]

    @property
    def left_out(self) -> Float[Tensor, "*stack s"]:
        """The sum without each cluster; m is symmetric."""
        return self.total[..., None] - 2 * self.of


@record(static=("labels", "num_params"))
class SecondMoments:
    """The sums that all second moments are made of.

    Attributes:
        products: ⟨K_a,st, K_b,st⟩ of blocks a and b.
        traces: tr K_a,ss for each block and cluster.
        weights: T_s T_t.
        sizes: T_s.
        labels: Of the blocks.
        num_params: P of each block.
    """

    products: Pairs
    traces: Float[Tensor, "b s"]
    weights: Pairs
    sizes: Float[Tensor, " s"]
    labels: tuple[str, ...]
    num_params: tuple[int, ...]


def second_moments_of(grams: TokenGrams, blocks: Mapping[str, tuple[str, ...]], clusters: Clusters) -> SecondMoments:
    """Return the sums over pairs of distinct clusters. Cost 2 N² B² operations for B blocks, no Gram of all blocks.

    Args:
        grams: The Grams of a pass.
        blocks: The Grams that each block is the sum of.
        clusters: Of the rows.
    """
    count, group = len(blocks), clusters.group
    of = torch.zeros(count, count, clusters.num_clusters, dtype=torch.float64, device=group.device)
    first = next(iter(grams.grams.values()))
    index = rows_here(first)[0]
    for rows in torch.arange(len(index), device=group.device).split(max(1, TILE // (count * len(group)))):
        tile = torch.stack([_rows(grams, names, rows) for names in blocks.values()])
        mine = group[index[rows]]
        tile *= mine[:, None] != group
        products = einsum(tile, tile, "b n m, c n m -> b c n")
        of.index_add_(-1, mine, products)
    of = total(first, of)
    diagonals = torch.stack([sum_of_diagonals(grams, names) for names in blocks.values()])
    return SecondMoments(
        products=Pairs(total=of.sum(dim=-1), of=of),
        traces=clusters.sums(diagonals),
        weights=outer_pairs(clusters.sizes),
        sizes=clusters.sizes,
        labels=tuple(blocks),
        num_params=tuple(num_params(grams, names) for names in blocks.values()),
    )


def outer_pairs(values: Float[Tensor, "*stack s"]) -> Pairs:
    """Return the sum of x_s x_t over pairs of distinct clusters."""
    of = values * (values.sum(dim=-1, keepdim=True) - values)
    return Pairs(total=of.sum(dim=-1), of=of)


def sum_of_diagonals(grams: TokenGrams, names: tuple[str, ...]) -> Float[Tensor, " n"]:
    """Return ‖g_n‖² of a block."""
    return torch.stack([grams.grams[name].diagonal().double() for name in names]).sum(dim=0)


def _rows(grams: TokenGrams, names: tuple[str, ...], rows: Tensor) -> Float[Tensor, "m n"]:
    """Some of the rows of K_b that lie here, in float64."""
    found = rows_here(grams.grams[names[0]])[1][rows].double()
    for name in names[1:]:
        found += rows_here(grams.grams[name])[1][rows]
    return found


def own_of(products: Pairs) -> Pairs:
    """Return Σ_a ⟨K_a, K_a⟩."""
    return Pairs(total=products.total.diagonal().sum(), of=products.of.diagonal(dim1=0, dim2=1).sum(dim=-1))


def summed(products: Pairs) -> Pairs:
    """Return Σ_ab ⟨K_a, K_b⟩: that of the full matrix."""
    return Pairs(total=products.total.sum(), of=products.of.sum(dim=(0, 1)))


def entry_of(products: Pairs, a: int, b: int) -> Pairs:
    """Return the sum of one pair of blocks."""
    return Pairs(total=products.total[a, b], of=products.of[a, b])


def full_of(moments: SecondMoments) -> SecondMoments:
    """Return the sums of the full matrix, as of one block."""
    products = summed(moments.products)
    return SecondMoments(
        products=Pairs(total=products.total[None, None], of=products.of[None, None]),
        traces=moments.traces.sum(dim=0, keepdim=True),
        weights=moments.weights,
        sizes=moments.sizes,
        labels=("full",),
        num_params=(sum(moments.num_params),),
    )
