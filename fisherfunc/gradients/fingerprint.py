"""What a pass works on, in a few lines of text: two passes with one fingerprint give the same Grams."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfunc.gradients.dense.subsample import Coordinates
from fisherfunc.gradients.workload import PassOptions, Workload
from fisherfunc.records.dtypes import dtype_name
from fisherfunc.records.tensor_files import bytes_of
from fisherfunc.records.versions import versions


def fingerprint(
    work: Workload, options: PassOptions, route: str, coordinates: Coordinates, targets: str = "observed"
) -> dict[str, str]:
    """SHA-256 of every tensor that the Grams depend on, and the options that decide how they are computed.

    Not in it: the code of the model, which has its class's name only, and the number of threads. Cost: every
    parameter is read once.
    """
    fn = work.fn
    others = {name: t for name, t in (fn.params | fn.frozen | fn.buffers).items() if name not in work.params}
    return {
        "model": fn.name,
        "parameters": _hash(dict(work.params)),
        "other tensors of the model": _hash(others),
        "batch": _hash(list(work.sequences)),
        "tokens": _hash([work.tokens.sequence, work.tokens.entry]),
        "targets": targets,
        "loss": f"{work.loss.name}, shift {work.loss.shift}",
        "route": route,
        "coordinates": _hash([dict(coordinates.index), dict(coordinates.weight)]),
        "chunk_size": str(options.chunk_size),
        "memory_limit": str(options.memory_limit),
        "gram_dtype": dtype_name(options.gram_dtype),
        "labels": "each parameter" if options.labels is None else _hash(dict(options.labels)),
        "spill": str(options.empty is not None),
        "device": next(iter(work.params.values())).device.type,
        "versions": str({name: version for name, version in versions().items() if name != "python"}),
    }


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What differs between two fingerprints, in words; empty where nothing does."""
    names = [name for name in dict.fromkeys([*here, *there]) if there.get(name) != here.get(name)]
    return ", ".join(_compared(name, there.get(name, "none"), here.get(name, "none")) for name in names)


def _compared(name: str, there: str, here: str) -> str:
    return name if {len(there), len(here)} & {64} else f"{name} ({there} there, {here} here)"


def _hash(tree: Any) -> str:
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
