"""Values as a hash: the same for equal trees of tensors and plain values, in every process and on every device."""

import hashlib
from typing import Any

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
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(bytes_of(leaf))
        else:
            plain = leaf is None or isinstance(leaf, str | int | float)
            found.update((repr(leaf) if plain else type(leaf).__qualname__).encode())
    return found.hexdigest()


def short_hash(tree: Any) -> str:
    """The first 16 digits of `hash_of`: for metadata that people read."""
    return hash_of(tree)[:SHORT]
