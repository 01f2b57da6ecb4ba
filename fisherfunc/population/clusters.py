"""Which rows are independent of which: the clusters that every estimator of the population takes as its draws.

Tokens of a sequence depend on each other; sequences are taken as independent, or, where they are not (paragraphs of a
document, answers to a prompt), the clusters that the caller names. Axis order: rows `(n,)`, clusters `(s,)`.
"""

from collections.abc import Hashable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.records.hashing import short_hash
from fisherfunc.records.record import record

LEAST = 3
NUM_FOLDS = 50

ClusterLabels = Iterable[Hashable] | Tensor | None
"""A label per sequence, in the order of their numbers, or per row of the Grams; None: those that the tokens have, or
else each sequence is a cluster."""


@record(static=("num_clusters",))
class Clusters:
    """The independent draws of a sample.

    Attributes:
        group: The cluster of each row, from 0 to `num_clusters` − 1.
        sizes: T_s: how many of the N units that F divides by each has.
        num_clusters: S.
    """

    group: Int[Tensor, " n"]
    sizes: Float[Tensor, " s"]
    num_clusters: int

    @property
    def num_units(self) -> Float[Tensor, ""]:
        """N."""
        return self.sizes.sum()

    def sums(self, rows: Float[Tensor, "... n"]) -> Float[Tensor, "... s"]:
        """Return Σ_{n∈s} of numbers of rows, for each cluster s."""
        return rows.new_zeros(*rows.shape[:-1], self.num_clusters).index_add(-1, self.group, rows)

    def rows(self) -> list[Int[Tensor, " m"]]:
        """Return the rows of each cluster."""
        order = self.group.argsort(stable=True)
        return list(order.split(torch.bincount(self.group, minlength=self.num_clusters).tolist()))

    def folds(self) -> "Clusters":
        """Return themselves, or, of more than `NUM_FOLDS`, so many groups of neighbours.

        What refits without each cluster at a cost that grows with their number takes these.
        """
        if self.num_clusters <= NUM_FOLDS:
            return self
        fold = torch.arange(self.num_clusters, device=self.group.device) * NUM_FOLDS // self.num_clusters
        sizes = self.sizes.new_zeros(NUM_FOLDS).index_add(0, fold, self.sizes)
        return Clusters(group=fold[self.group], sizes=sizes, num_clusters=NUM_FOLDS)


def coded(labels: Iterable[Hashable] | Tensor, num_sequences: int) -> Int[Tensor, " s"]:
    """Return the cluster of each sequence, numbered in their order, from a label per sequence.

    Raises:
        ValueError: If there are not as many labels as sequences.
    """
    numbered = _numbered(labels)
    if len(numbered) != num_sequences:
        raise ValueError(f"clusters expected one label per sequence ({num_sequences}), got {len(numbered)}")
    return numbered


def clustered(grams: TokenGrams, labels: ClusterLabels) -> TokenGrams:
    """Return Grams whose tokens have these clusters; where None, those that they have, or none.

    Raises:
        ValueError: If labels are neither one per sequence nor one per row, or part a sequence.
    """
    if labels is None:
        return grams
    _, sequence = torch.unique(grams.tokens.sequence, return_inverse=True)
    of_sequence = _of_sequences(_numbered(labels).to(sequence.device), sequence)
    return replace(grams, tokens=replace(grams.tokens, cluster=of_sequence[sequence]))


def cluster_id(grams: TokenGrams) -> str | None:
    """Return a hash of which sequences are in one cluster; None where each is its own."""
    if grams.tokens.cluster is None:
        return None
    sequences, sequence = torch.unique(grams.tokens.sequence, return_inverse=True)
    return short_hash([sequences, _numbered(_of_sequences(grams.tokens.cluster, sequence))])


def clusters_of(grams: TokenGrams, labels: ClusterLabels, what: str) -> Clusters:
    """Return the clusters of Grams that an estimate of the population can be made of, in the order of sequences.

    Args:
        grams: The Grams of a pass.
        labels: Of sequences or rows; where None, the clusters that the tokens have, or else their sequences.
        what: What is to be estimated, for the error.

    Raises:
        ValueError: If there are fewer than three clusters, labels are neither one per sequence nor one per row or part
            a sequence, the rows are centred, some coordinates of a gradient alone, or neither tokens nor sequences.
    """
    _check_estimable(grams, what)
    tokens = clustered(grams, labels).tokens
    _, group = torch.unique(tokens.sequence, return_inverse=True)
    if tokens.cluster is not None:
        group = _numbered(_of_sequences(tokens.cluster, group)).to(group.device)[group]
    num_clusters = int(group.max()) + 1
    if num_clusters < LEAST:
        called = "sequences" if tokens.cluster is None else "clusters"
        raise ValueError(
            f"{what} of the population needs at least {LEAST} {called}, got {num_clusters}: only independent "
            f"{called} show what other tokens would give; pass over more of them"
        )
    rows = torch.bincount(group, minlength=num_clusters).double()
    return Clusters(group=group, sizes=rows * (grams.num_units / len(group)), num_clusters=num_clusters)


def _check_estimable(grams: TokenGrams, what: str) -> None:
    if grams.centered:
        raise ValueError(
            f"{what} of the population expected uncentred Grams, got centred ones: the mean of the sample ties all "
            "sequences together, so that none is independent of another; take the Grams before center()"
        )
    sampled = list(grams.provenance.sampled_parameters or ())
    if sampled:
        raise ValueError(
            f"{what} of the population expected Grams of all coordinates, got a sample of those of {sampled[0]!r} "
            f"({len(sampled)} parameters in all), or a sketch: products of such rows are biased; pass without "
            "max_coordinates, and without a sketch"
        )
    if grams.unit not in ("token", "sequence"):
        raise ValueError(
            f"{what} of the population expected rows of unit 'token' or 'sequence', got unit={grams.unit!r}; it is not "
            "known which of them are independent"
        )


def _numbered(labels: Iterable[Hashable] | Tensor) -> Int[Tensor, " s"]:
    """Labels as numbers, in the order in which they come."""
    given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    unusable = next((label for label in given if not isinstance(label, Hashable)), None)
    if unusable is not None:
        raise TypeError(f"clusters expected one label per sequence, a number or a name, got {unusable!r} for one")
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in given], dtype=torch.int64, device="cpu")


def _of_sequences(codes: Int[Tensor, " m"], sequence: Int[Tensor, " n"]) -> Int[Tensor, " s"]:
    """The cluster of each sequence, from one per sequence or per row; sequences are numbered from 0."""
    num_sequences = int(sequence.max()) + 1
    if len(codes) == len(sequence):
        first = torch.full((num_sequences,), -1, dtype=torch.int64, device=sequence.device)
        first[sequence] = codes
        parted = (first[sequence] != codes).nonzero()
        if len(parted):
            number = int(sequence[parted[0, 0]])
            raise ValueError(
                f"clusters expected all tokens of a sequence in one cluster, got several for the sequence of index "
                f"{number}: tokens of a sequence depend on each other; give one label per sequence"
            )
        return first
    if len(codes) == num_sequences:
        return codes
    raise ValueError(
        f"clusters expected one label per sequence ({num_sequences}) or one per row ({len(sequence)}), got {len(codes)}"
    )
