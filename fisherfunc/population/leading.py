"""The leading eigenvalues of the population, between what holds out of the sample and what holds in it.

    λ₁           ∈  [ max(p₂/p₁, p₃/p₂, p₄/p₃, λ_out,1), p₄^¼ ]        p_k = tr F^k; true of every population
    Σ_{i≤k} λ_i  ∈  [ Σ_{i≤k} λ_out,i, Σ_{i≤k} λ̂_i ]            in expectation (Ky Fan, and convexity)
    Σ_{i≤k} λ_i  ∈  [ λ₁, min_q k^{1−1/q} p_q^{1/q} ]            true of every population (Hölder)
    λ_out,i      =  (1/N) Σ_s ‖G_s v_i^(−s)‖²                   v_i^(−s) the eigenvectors without cluster s

λ̂ are the eigenvalues of the sample, each too large. Each end is widened by its own error. Where one token of a large
norm carries v₁, no bracket of a single λ_k, k > 1, holds.

The eigenvectors without each cluster come from block Krylov spaces, of all clusters at once: any directions in which
nothing of cluster s has a part give a lower bound, and the start is random, so that convergence sharpens the bound and
is not needed for it. Axis order: clusters `(s,)`, rows `(s, n, k)`.
Source: Fan, "On a theorem of Weyl concerning eigenvalues", PNAS 35, 1949; Musco and Musco, "Randomized block Krylov
methods", NeurIPS 2015.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.population.clusters import ClusterLabels, Clusters, clusters_of
from fisherfunc.population.estimate import Estimate, check_level, jackknifed
from fisherfunc.population.moments import Moments, moments_of
from fisherfunc.records.record import record
from fisherfunc.statistics.resampling.heavy_tail import heavy_moment

GUARD = 3
DEPTH = 4
ROUNDS = 12
CHANGE = 1e-7
"""Relative to λ₁: when Ritz values stop moving."""
STABLE = 0.5
"""How much of the leading directions has to exist beyond the sample, λ_out/λ̂, for the error of what they hold of each
cluster to be that of a mean. Where it is less they turn with each cluster that is left out, all of them at once: of a
flat spectrum, where it is 0.2, by simulation of 50 clusters of 8 tokens, λ_out,1 spread by 20 % and the mean over
clusters by 8 %."""
NEGLIGIBLE = 1e-10
"""What is left of a vector that adds a dimension: far above round-off, of which a smaller rest would consist."""


Eigenbasis = tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]
Product = Callable[[Float[Tensor, "s n k"]], tuple[Float[Tensor, "s n k"], Float[Tensor, "s k"]]]
"""K times blocks of columns, each without one cluster, and the squared norms of what the image has in that cluster."""


@record()
class HeldOut:
    """What the leading directions of the others hold of each cluster.

    Attributes:
        inside: λ̂_k, of the sample.
        without: λ̂_k of the sample without each cluster.
        outside: ‖G_s v_k^(−s)‖² of each cluster.
        sizes: T_s.
    """

    inside: Float[Tensor, " k"]
    without: Float[Tensor, "s k"]
    outside: Float[Tensor, "s k"]
    sizes: Float[Tensor, " s"]

    @property
    def eigenvalues(self) -> Float[Tensor, " k"]:
        """λ_out,k."""
        return self.outside.sum(dim=0) / self.sizes.sum()

    def stable(self, num: int) -> bool:
        """Return whether most of the leading `num` directions exists beyond the sample."""
        return bool(self.eigenvalues[:num].sum() >= STABLE * self.inside[:num].sum())


def held_out(
    gram: Float[Tensor, "n n"], clusters: Clusters, num: int, seed: int = 0, eigenpairs: Eigenbasis | None = None
) -> HeldOut:
    """Return the leading eigenvalues in and out of sample, fifty folds of clusters where there are more than fifty.

    Cost about 2 N² S (num + 3) operations a Krylov step, of which there are `DEPTH` a round; with eigenpairs 8 N²
    (num + 3), as rows without a cluster are then a projection of rank T. The same vectors, to round-off of λ̂₁.

    Args:
        gram: K, in float64.
        clusters: Of the rows.
        num: How many.
        seed: Of the start.
        eigenpairs: Of K, ascending, where they are known.
    """
    folds = clusters.folds()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(gram), num + GUARD, generator=generator, dtype=gram.dtype, device="cpu").to(gram.device)
    if eigenpairs is None:
        found = [_leading(*_of_rows(gram, folds, start), num)]
    else:
        start = eigenpairs[1].mT @ start
        found = [_leading(*_of_eigenpairs(eigenpairs, rows, start), num) for rows in (None, *folds.rows())]
    values, outside = (torch.cat(parts) for parts in zip(*found, strict=True))
    rest = folds.sizes.sum() - folds.sizes
    return HeldOut(
        inside=values[0] / folds.sizes.sum(), without=values[1:] / rest[:, None], outside=outside[1:], sizes=folds.sizes
    )


def _of_rows(
    gram: Float[Tensor, "n n"], folds: Clusters, start: Float[Tensor, "n k"]
) -> tuple[Product, Float[Tensor, "s n k"]]:
    """K between rows that are not in a cluster, the first time between all rows; and the start, of those rows."""
    out = (folds.group == torch.arange(-1, folds.num_clusters, device=gram.device)[:, None])[:, :, None]

    def product(block: Tensor) -> tuple[Tensor, Tensor]:
        count, rows, width = block.shape  # all blocks as one product of matrices
        image = (gram @ block.transpose(0, 1).reshape(rows, count * width)).reshape(rows, count, width).transpose(0, 1)
        return image * ~out, (image * out).square().sum(dim=1)

    return product, ~out * start


def _of_eigenpairs(
    eigenpairs: Eigenbasis, rows: Int[Tensor, " m"] | None, start: Float[Tensor, "n k"]
) -> tuple[Product, Float[Tensor, "1 n k"]]:
    """The same without one cluster in the basis of the eigenvectors: (I − VᵀV) Λ (I − VᵀV), with V its rows of them.

    The first factor is for round-off, which may have led back to the cluster; both are in two products with V.
    """
    values, vectors = eigenpairs[0][:, None], eigenpairs[1]
    own = vectors[:0] if rows is None else vectors[rows]
    weighted = own @ (values * own.mT)

    def product(block: Tensor) -> tuple[Tensor, Tensor]:
        inside, held = (own @ torch.cat([block, values * block], -1)).chunk(2, dim=-1)
        held = held - weighted @ inside
        first, last = (own.mT @ torch.cat([inside, held], -1)).chunk(2, dim=-1)
        return values * (block - first) - last, held.square().sum(dim=1)

    return product, (start - own.mT @ (own @ start))[None]


def _leading(
    product: Product, start: Float[Tensor, "s n k"], num: int
) -> tuple[Float[Tensor, "s k"], Float[Tensor, "s k"]]:
    """The leading eigenvalues, and the squared norms of what their directions hold of each cluster; zeros pad."""
    block, before = start, start.new_zeros(len(start), num)
    for _ in range(ROUNDS):
        basis, image = block[:, :, :0], block[:, :, :0]
        for _ in range(DEPTH):
            block = _orthonormal(block, basis)
            following, _ = product(block)
            basis, image, block = torch.cat([basis, block], -1), torch.cat([image, following], -1), following
        projected = basis.mT @ image
        values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
        block = basis @ vectors[:, :, -num - GUARD :].flip(-1)
        values = values.flip(-1)[:, :num].clamp(min=0)
        if bool(((values - before).abs() <= CHANGE * values[:, :1]).all()):
            break
        before = values
    shown = values > NEGLIGIBLE * values[:, :1]  # a direction below is none, and holds nothing
    lengths = torch.where(shown, values.where(shown, 1.0).rsqrt(), 0.0)
    return values, product(block[:, :, :num] * lengths[:, None, :])[1]


def _orthonormal(block: Float[Tensor, "s n k"], basis: Float[Tensor, "s n l"]) -> Float[Tensor, "s n k"]:
    """An orthonormal basis of what the columns add to a basis; zero columns where they add fewer dimensions."""
    lengths = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
        left = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        block = torch.where(left > NEGLIGIBLE * lengths, block, 0.0)
    block = torch.where(block != 0, block / left, 0.0)
    values, vectors = torch.linalg.eigh(block.mT @ block)
    added = values > NEGLIGIBLE
    block = (block @ vectors) * torch.where(added, values.where(added, 1.0).rsqrt(), 0.0)[:, None, :]
    return block - basis @ (basis.mT @ block)


@dataclass(frozen=True, kw_only=True)
class LeadingSums:
    """The leading eigenvalues in and out of sample, and what the sums of those of the population lie between.

    Attributes:
        in_sample: λ̂_k: of these tokens.
        out_of_sample: λ_out,k: what direction k of all other clusters holds of a cluster, per token; λ_out,k/λ̂_k is the
            share of direction k that exists beyond the sample.
        sums: Σ_{i≤k} λ_i of the population, for k = 1 and on; a bracket, without a point.
    """

    in_sample: tuple[float, ...]
    out_of_sample: tuple[float, ...]
    sums: tuple[Estimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive JSON."""
        return {
            "in_sample": list(self.in_sample),
            "out_of_sample": list(self.out_of_sample),
            "sums": [entry.to_dict() for entry in self.sums],
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> "LeadingSums":
        """Return what `to_dict` was called on."""
        return LeadingSums(
            in_sample=tuple(content["in_sample"]),
            out_of_sample=tuple(content["out_of_sample"]),
            sums=tuple(map(Estimate.from_dict, content["sums"])),
        )


def bracket_of_sums(found: HeldOut, moments: Moments, level: float) -> LeadingSums:
    """Return the brackets of Σ_{i≤k} λ_i: out of sample or λ₁ below, in sample or by moments above.

    Ends that come from moments count where the intervals of these hold.
    """
    above, above_without = found.inside.cumsum(0), found.without.cumsum(1)
    first, uppers = bracket_of_leading(moments, found, level), _roots(moments, level)
    sums = []
    for k in range(len(found.inside)):
        upper = {"in sample": _plain(above[k], above_without[:, k], level).high}
        lower = {} if first.warning is not None else {"λ₁": first.low}
        if found.stable(k + 1) or not lower:
            lower["out of sample"] = _outside(found, k, level).low
        if first.warning is None:
            upper |= {f"p{q}": (k + 1) ** (1 - 1 / q) * root.high for q, root in uppers.items()}
        lowest, highest = max(lower, key=lower.__getitem__), min(upper, key=upper.__getitem__)
        sums.append(
            Estimate(
                estimate=None,
                low=min(lower[lowest], upper[highest]),
                high=upper[highest],
                level=level,
                num_clusters=len(found.sizes),
                method=f"{lowest} to {highest}, jackknife",
            )
        )
    return LeadingSums(
        in_sample=tuple(found.inside.tolist()), out_of_sample=tuple(found.eigenvalues.tolist()), sums=tuple(sums)
    )


def _roots(found: Moments, level: float) -> dict[int, Estimate]:
    """p_q^(1/q) of the orders q whose moments are positive, with and without each cluster."""
    pairs = zip(found.values, found.left_out, strict=True)
    return {
        q: _plain(value ** (1 / q), left_out ** (1 / q), level)
        for q, (value, left_out) in enumerate(pairs, start=2)
        if bool(value > 0) and bool((left_out > 0).all())
    }


def _outside(found: HeldOut, k: int, level: float) -> Estimate:
    """Σ_{i≤k} λ_out,i, with the error of a mean over clusters."""
    parts = found.outside[:, : k + 1].sum(dim=1)
    return _plain(parts.sum() / found.sizes.sum(), (parts.sum() - parts) / (found.sizes.sum() - found.sizes), level)


def _plain(value: Float[Tensor, ""], left_out: Float[Tensor, " s"], level: float) -> Estimate:
    return jackknifed(value, left_out, level=level, limits=(0.0, torch.inf), method="jackknife")


def bracket_of_leading(found: Moments, outside: HeldOut, level: float) -> Estimate:
    """Return what λ₁ lies between.

    The upper end is that of p_k^(1/k) of the highest order k that is positive, with and without each cluster; the lower
    that of the largest of p_{k+1}/p_k of such orders, p₁ the trace, and of λ_out,1 where it is stable.
    """
    positive = [bool(v > 0) and bool((w > 0).all()) for v, w in zip(found.values, found.left_out, strict=True)]
    lower = [("out of sample", _outside(outside, 0, level))] if outside.stable(1) else []
    traces, sizes = found.traces, found.sizes
    trace, without = traces.sum() / sizes.sum(), (traces.sum() - traces) / (sizes.sum() - sizes)
    lower.append(("p2/p1", _plain(found.values[0] / trace, found.left_out[0] / without, level)))
    for k in range(len(positive) - 1):
        if positive[k] and positive[k + 1]:
            ratio = found.values[k + 1] / found.values[k], found.left_out[k + 1] / found.left_out[k]
            lower.append((f"p{k + 3}/p{k + 2}", _plain(*ratio, level)))
    highest = max((k for k in range(len(positive)) if positive[k]), default=0)
    power = 1 / (highest + 2)
    upper = _plain(found.values[highest].clamp(min=0) ** power, found.left_out[highest].clamp(min=0) ** power, level)
    which, largest = max(lower, key=lambda entry: entry[1].low)
    return Estimate(
        estimate=None,
        low=min(largest.low, upper.high),
        high=upper.high,
        level=level,
        num_clusters=len(found.sizes),
        method=f"{which} to p{highest + 2}^(1/{highest + 2}), jackknife",
        warning=heavy_moment(found.traces, found.parts[0], found.sizes, "the moments"),
    )


def leading_eigenvalue(grams: TokenGrams, *, clusters: ClusterLabels = None, level: float = 0.95) -> Estimate:
    """Return what λ₁ of the population lies between, from moments and directions out of sample; no point.

    λ₁ of the sample is too large by as much as one token of a large norm makes it. The geometric mean of the ends is no
    better an estimate than either, where norms have heavy tails, so that there is none. Cost about 4 N³ operations.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage of both ends together.

    Raises:
        ValueError: If there are fewer than three clusters, or the Grams are centred or of sampled coordinates.
    """
    check_level(level)
    found, gram = clusters_of(grams, clusters, "the leading eigenvalue"), grams.block().double()
    return bracket_of_leading(moments_of(gram, found), held_out(gram, found, 1), level)


def leading_sums(
    grams: TokenGrams, *, num: int = 5, clusters: ClusterLabels = None, level: float = 0.95
) -> LeadingSums:
    """Return what Σ_{i≤k} λ_i of the population lie between, k = 1 … num, and λ_k in and out of sample.

    Above fifty clusters, fifty folds of neighbours are left out in turn. Cost as `held_out` and `moments`.

    Args:
        grams: The uncentred Grams of a pass, of all coordinates.
        num: How many.
        clusters: A label per sequence, or per row; where None, sequences are independent.
        level: The nominal coverage.

    Raises:
        ValueError: If there are fewer than three clusters, `num` is less than one or more than there are rows, or the
            Grams are centred or of sampled coordinates.
    """
    check_level(level)
    found = clusters_of(grams, clusters, "the leading eigenvalues")
    if not 1 <= num <= grams.num_rows:
        raise ValueError(f"num expected 1 to {grams.num_rows} eigenvalues, the number of rows, got num={num!r}")
    gram = grams.block().double()
    return bracket_of_sums(held_out(gram, found, num), moments_of(gram, found), level)
