"""Grams whose rows lie on several ranks: what is asked of a whole one, asked of all of them together.

A rank holds some rows of K with all columns. Each function here takes an ordinary matrix as well, so that what uses
them need not know; of a divided one every rank calls it alike, and gets the same. Axis order: m rows here, n columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.distributed.collectives import Everyone
from fisherfunc.linalg.gram import Gram
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.linalg.grams.which_fisher import check_center
from fisherfunc.records.record import record


@dataclass(frozen=True, kw_only=True, eq=False)
class DividedGram:
    """The rows of a Gram that one rank holds.

    Attributes:
        rows: Some rows of K.
        index: Which they are, in ascending order.
        norms: The diagonal of K, which every rank has.
        everyone: The ranks.
    """

    rows: Float[Tensor, "m n"]
    index: Int[Tensor, " m"]
    norms: Float[Tensor, " n"]
    everyone: Everyone

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Of the rows here."""
        return self.rows.device

    def __len__(self) -> int:
        """How many rows all of it has."""
        return self.rows.shape[1]

    def diagonal(self) -> Float[Tensor, " n"]:
        """That of the whole matrix."""
        return self.norms

    def new_tensor(self, value: Any) -> Tensor:
        """A tensor of the dtype and on the device."""
        return self.rows.new_tensor(value)


AnyGram = Tensor | DividedGram


def divided(rows: Float[Tensor, "m n"], index: Int[Tensor, " m"], everyone: Everyone) -> DividedGram:
    """Return the Gram that each rank gives some rows of."""
    norms = rows.new_zeros(rows.shape[1])
    norms[index] = rows[torch.arange(len(index), device=rows.device), index]
    return DividedGram(rows=rows, index=index, norms=everyone.summed("diagonals", norms), everyone=everyone)


def submatrix(gram: Any, kept: Int[Tensor, " k"]) -> Any:
    """Return the Gram of some rows, in ascending order: divided where it was."""
    if not isinstance(gram, DividedGram):
        return gram[kept][:, kept]
    here = torch.isin(gram.index, kept)
    index = torch.searchsorted(kept, gram.index[here])
    return replace(gram, rows=gram.rows[here][:, kept], index=index, norms=gram.norms[kept])


def entries(gram: AnyGram, rows: Int[Tensor, " k"]) -> Float[Tensor, "k k"]:
    """Return the same for few rows, on every rank."""
    if not isinstance(gram, DividedGram):
        return gram[rows][:, rows]
    mine = submatrix(gram, rows)
    return _summed(gram, _filled(mine, len(rows)), "some entries")


def squared_norm(gram: AnyGram) -> Float[Tensor, ""]:
    """Return ‖K‖_F², in float64."""
    if not isinstance(gram, DividedGram):
        return torch.linalg.matrix_norm(gram.double()).square()
    return _summed(gram, gram.rows.double().square().sum(), "a squared norm")


def products(grams: list[DividedGram], weights: Float[Tensor, " m"]) -> Float[Tensor, " b"]:
    """Return uᵀ K u of several Grams for the weights u of all rows, of which each rank gives those of its own."""
    u = weights.new_zeros(len(grams[0]))
    u[grams[0].index] = weights
    u = grams[0].everyone.summed("weights", u)
    found = torch.stack([weights @ (gram.rows @ u.to(gram.rows)).double() for gram in grams])
    return _summed(grams[0], found, "products")


def rows_here(gram: AnyGram) -> tuple[Int[Tensor, " m"], Float[Tensor, "m n"]]:
    """Return the rows of K that lie here, and which they are."""
    if isinstance(gram, DividedGram):
        return gram.index, gram.rows
    return torch.arange(len(gram), device=gram.device), gram


def total(gram: AnyGram, part: Tensor) -> Tensor:
    """Return the sum over ranks of what each computes from its rows; `part` is written to."""
    return _summed(gram, part, "a sum over rows") if isinstance(gram, DividedGram) else part


def _filled(gram: DividedGram, count: int) -> Tensor:
    found = gram.rows.new_zeros(count, count)
    found[gram.index] = gram.rows
    return found


def _summed(gram: DividedGram, part: Tensor, name: str) -> Tensor:
    return gram.everyone.summed(name, part)


@record(static=("num_params", "unit", "centered", "precision", "labels"), notes=("provenance",))
class DividedGrams(TokenGrams):
    """The Grams of a pass over ranks. What needs a whole matrix does not take them, but `assembled` makes one.

    Attributes:
        grams: {name: the rows that lie here}.
    """

    grams: dict[str, DividedGram]  # type: ignore[assignment]

    @property
    def everyone(self) -> Everyone:
        """The ranks."""
        return next(iter(self.grams.values())).everyone

    def center(self) -> "DividedGrams":
        """Subtract the mean row; see `TokenGrams`."""
        check_center(self.fisher)
        if self.centered:
            return self
        scale = {name: squared_norm(gram).sqrt() for name, gram in self.grams.items()}
        return replace(self, grams={n: _centred(gram) for n, gram in self.grams.items()}, scale=scale, centered=True)

    def assembled(self, wanted: Sequence[Sequence[str] | None]) -> Gram | None:
        """Return the Gram of a block of parameters, the sum of those of its parts, on the rank that wants it.

        Args:
            wanted: The names that each rank wants, or None.

        Returns:
            That of this rank.
        """
        everyone = self.everyone
        rank, size = everyone.rank, everyone.size
        first = next(iter(self.grams.values()))
        index, mine = everyone.gathered("rows", first.index.cpu()), wanted[rank]
        matrix = None if mine is None else first.rows.new_empty(len(first), len(first))
        for step in range(size):
            to, source = (rank + step) % size, (rank - step) % size
            theirs = wanted[to]
            rows = first.rows[:0] if theirs is None else self._rows(theirs)
            (found,), _ = everyone.exchanged("rows of a block", [rows], None, to=to, source=source)
            if matrix is not None:
                matrix[index[source].to(matrix.device)] = found
        if mine is None or matrix is None:
            return None
        return Gram(
            matrix=matrix,
            num_units=self.num_units,
            num_params=sum(self.num_params[name] for name in mine),
            precision=self.precision,
            scale=torch.stack([self.scale[name] for name in mine]).sum() if self.scale else None,
            error=self.block_error(mine),
        )

    def _rows(self, names: Sequence[str]) -> Tensor:
        found = self.grams[names[0]].rows
        for name in names[1:]:
            found = found + self.grams[name].rows
        return found


def whole(grams: TokenGrams) -> TokenGrams:
    """Return divided Grams as ordinary ones, on every rank."""
    assert isinstance(grams, DividedGrams)
    return _ordinary(grams, {n: _summed(gram, _filled(gram, len(gram)), n) for n, gram in grams.grams.items()})


def whole_on_first(grams: DividedGrams) -> TokenGrams | None:
    """Return divided Grams as ordinary ones, on rank 0."""
    nobody = [None] * (grams.everyone.size - 1)
    found = {name: grams.assembled([(name,), *nobody]) for name in grams.grams}
    kept = {name: gram.matrix for name, gram in found.items() if gram is not None}
    return _ordinary(grams, kept) if kept else None


def _ordinary(grams: DividedGrams, matrices: dict[str, Tensor]) -> TokenGrams:
    others = {entry.name: getattr(grams, entry.name) for entry in fields(grams) if entry.name != "grams"}
    return TokenGrams(grams=matrices, **others)


def _centred(gram: DividedGram) -> DividedGram:
    means = gram.rows.new_zeros(len(gram))
    means[gram.index] = gram.rows.mean(dim=1)
    means = _summed(gram, means, "means of rows")  # of columns too: K is symmetric
    rows = gram.rows - means[gram.index, None] - means + means.mean()
    return replace(gram, rows=rows, norms=gram.norms - 2 * means + means.mean())
