"""Grams of embeddings: rows of the weight that two gradients share are all that their inner product has.

The gradient of a token by a table W[ids] has the rows G_n[v] = Σ_{s: id_s = v} δ_{n,s}, and zeros elsewhere, so that
K[n,m] = Σ_v ⟨G_n[v], G_m[v]⟩ over the ids of both. Axis order: z entries, each of a row n and an id v, of d features.
"""

from collections.abc import Iterator, Sequence

import torch
from einops import repeat
from torch import Tensor

from fisherfunc.linalg.factors.strips import Strip


def add_by_id(gram: Tensor, strips: Sequence[Strip]) -> None:
    """K += the Gram of strips whose shared factors are ids. `gram` is written to.

    Cost M_v² d operations for each id v that occurs in the sequences of M_v rows: at most N² S d.
    """
    for _, rows, values in _by_id(strips):
        gram[rows[:, None], rows] += (values @ values.mT).to(gram.dtype)


def cross_by_id(block: Tensor, strips: Sequence[Strip], others: Sequence[Strip]) -> None:
    """Block += K between the rows of strips and those of others, all of ids. `block` is written to.

    Cost M_v M'_v d operations for each id v that occurs in the sequences of M_v rows and of M'_v others.
    """
    mine = {number: (rows, values) for number, rows, values in _by_id(strips)}
    for number, columns, theirs in _by_id(others):
        if number in mine:
            rows, values = mine[number]
            block[rows[:, None], columns] += (values @ theirs.mT).to(block.dtype)


def _by_id(strips: Sequence[Strip]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each id, with its rows and their values."""
    parts = [part for strip in strips for part in _entries(strip)]
    rows, ids, values = _once(*(torch.cat(column) for column in zip(*parts, strict=True)))
    order = ids.argsort(stable=True)
    found, counts = ids[order].unique_consecutive(return_counts=True)
    for number, some in zip(found.tolist(), order.split(counts.tolist()), strict=True):
        yield number, rows[some], values[some]


def _entries(strip: Strip) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rows `(z,)`, ids `(z,)` and values `(z, d)` of the gradients of a strip, once each."""
    found = []
    for rows, factors in strip.factors():
        ids, place = factors.shared[: factors.own.shape[1]].unique(return_inverse=True)
        values = factors.own.new_zeros(len(rows), len(ids), factors.own.shape[2]).index_add(1, place, factors.own)
        both = repeat(rows, "n -> (n v)", v=len(ids)), repeat(ids, "v -> (n v)", n=len(rows))
        found.append((*both, values.flatten(0, 1)))
    return found


def _once(rows: Tensor, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries with those of one row and id added up: a row may meet an id in several uses of the table."""
    count = int(rows.max()) + 1
    keys, entry = (ids * count + rows).unique(return_inverse=True)
    if len(keys) == len(rows):
        return rows, ids, values
    return keys % count, keys // count, values.new_zeros(len(keys), values.shape[1]).index_add(0, entry, values)
