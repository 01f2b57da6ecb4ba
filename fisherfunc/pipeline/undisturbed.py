"""A context that leaves what surrounds it as it was: the global random generators, and no autocast inside."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

DEVICES = (torch.cuda, torch.xpu)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's global generators back, of every device in use, also on an error.

    Autocast is off inside: a model then computes in the dtype of its weights, and the cache of casted weights that the
    forward pass of a training step has begun is not touched.

    Args:
        device: Where the model lies.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = [(module, module.get_rng_state_all()) for module in DEVICES if module.is_initialized()]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for module, states in devices:
            module.set_rng_state_all(states)
        if mps is not None:
            torch.mps.set_rng_state(mps)
