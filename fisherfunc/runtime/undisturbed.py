"""A context that leaves what surrounds it as it was: the global random generators, and no autocast inside."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fisherfunc.runtime.draws import put_back


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's global generators back, of every device in use, also on an error.

    Autocast is off inside: a model then computes in the dtype of its weights, and the cache of casted weights that the
    forward pass of a training step has begun is not touched.

    Args:
        device: Where the model lies.
    """
    with put_back(), torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield
