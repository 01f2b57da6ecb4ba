"""The sizes of a GPU's pieces of work on a CPU: results do not depend on them."""

from fisherfunc.gradients.factored import contract, loads
from fisherfunc.linalg import grain, strips, triangle


def as_on_a_gpu(monkeypatch) -> None:
    """Let every pass be divided as it would be on a GPU."""
    for module in (strips, triangle, loads, contract):
        monkeypatch.setattr(module, "grain_of", lambda device: grain.GPU)
