"""A GPU's way to divide a pass, on a CPU and at the scale of tiny models: results do not depend on it."""

from dataclasses import replace

from fisherfunc.gradients.factored import loads
from fisherfunc.gradients.factors import contract
from fisherfunc.linalg.factors import strips, triangle
from fisherfunc.runtime import grain

TINY = replace(grain.GPU, features=4, middle_bytes=2**11, rows=5)
"""Several blocks of features, groups of strips and tiles."""


def as_on_a_gpu(monkeypatch, **sizes: int) -> None:
    """Let every pass be divided as it would be on a GPU."""
    for module in (strips, triangle, loads, contract):
        monkeypatch.setattr(module, "grain_of", lambda device: replace(TINY, **sizes))
