"""Values as a hash: the same for equal trees of tensors and plain values, in every process and on every device."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfunc.records.tensor_files import bytes_of

SHORT = 16


def hash_of(tree: Any) -> str:
    """SHA-256 of a tree, in hexadecimal: the paths of its leaves; dtype, shape and values of tensors; plain values.

    Anything else counts by the name of its type. Cost: every tensor is read once.

    Args:
        tree: Tensors and plain values in lists, tuples, dictionaries and records.

    Example:
        >>> hash_of([1, "a"]) == hash_of([1, "a"]), hash_of([1, "a"]) == hash_of([1, "b"])
        (True, False)
    """
    found = hashlib.sha256()
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        found.update(pytree.keystr(path).encode())
        found.update(_head(leaf))
        if isinstance(leaf, Tensor):
            found.update(bytes_of(leaf))
    return found.hexdigest()


class Column(NamedTuple):
    """A leaf of a tree whose rows are hashed: its path, itself, and whether each row has a row of it or all of it."""

    path: str
    leaf: Any
    sliced: bool


def hash_of_rows(trees: Iterable[tuple[Sequence[Column], int]]) -> str:
    """`hash_of` the list of all rows, each a tree with a leading axis of length 1; of thousands at once.

    Args:
        trees: The columns of each tree, and the number of its rows.
    """
    found, before = hashlib.sha256(), 0
    for columns, size in trees:
        named = [(column.path.encode(), _head_of_row(column)) for column in columns]
        for number, row in enumerate(zip(*(_bytes_of_rows(c, size) for c in columns), strict=True), start=before):
            index = f"[{number}]".encode()
            for (path, head), data in zip(named, row, strict=True):
                found.update(b"%b%b%b" % (index, path, head))
                found.update(data)
        before += size
    return found.hexdigest()


def _head_of_row(column: Column) -> bytes:
    return _head(column.leaf[:1] if column.sliced else column.leaf)


def _bytes_of_rows(column: Column, size: int) -> Iterable[memoryview | bytes]:
    if isinstance(column.leaf, np.ndarray):
        rows = [column.leaf[row : row + 1] if column.sliced else column.leaf for row in range(size)]
        return [repr(row.tolist()).encode() for row in rows]
    if not isinstance(column.leaf, Tensor):
        return [hash_of(entry).encode() for entry in column.leaf] if column.sliced else repeat(b"", size)
    data = bytes_of(column.leaf)
    if not column.sliced:
        return repeat(data, size)
    step = len(data) // size
    return [data[row * step : (row + 1) * step] for row in range(size)]


def _head(leaf: Any) -> bytes:
    """What a leaf is, and its value where it is plain."""
    if isinstance(leaf, Tensor | np.ndarray):
        return f"{leaf.dtype} {tuple(leaf.shape)}".encode()
    plain = leaf is None or isinstance(leaf, str | int | float)
    return (repr(leaf) if plain else type(leaf).__qualname__).encode()


def short_hash(tree: Any) -> str:
    """The first 16 digits of `hash_of`: for metadata that people read."""
    return hash_of(tree)[:SHORT]
