"""The contenders by name: each a function (task, options) → work that is ready to run; imported when it is its turn."""

from importlib import import_module

from benchmarks.contenders.common import Contender

TITLES = {
    "loop": "loop of backward passes",
    "vmap": "vmap(grad)",
    "curvlinops": "curvlinops, eigsh",
    "nngeometry": "nngeometry",
    "backpack": "BackPACK",
    "vivit": "ViViT",
    "neural_tangents": "neural-tangents",
    "ours": "fisherfunc",
}


def contender(name: str) -> Contender:
    """The contender of a name; its library is imported once it prepares for a task."""
    return import_module(f"benchmarks.contenders.{name}").prepare
