"""Random numbers that code of the user's draws from global generators: the same in each call, and none of theirs moves.

| whose code | draws |
| --- | --- |
| a model, a loss | the same in each call |
| a data set that is read | what the user's generators would give next |

Generators, and what else of torch a call sets, are those of the process: of several threads one runs a model at a time,
or the last to leave would put back what the first had set.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import numpy as np
import torch

ONE_AT_A_TIME = RLock()
"""To be held while anything is set that belongs to the process."""
_GLOBAL: Any = np.random  # its types do not name all that it has
_PYTHON_DRAWS, _NUMPY = random.Random(0).getstate(), np.random.MT19937(0)
_NUMPY_START = _NUMPY.state


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Draw the same random numbers each time; no global generator moves, of torch, NumPy or Python.

    Args:
        device: Whose generator is used beside the CPU's.
    """
    with ONE_AT_A_TIME:
        on_cuda = device.type == "cuda"
        python, numpy = random.getstate(), _GLOBAL.get_bit_generator()
        try:
            random.setstate(_PYTHON_DRAWS)
            _NUMPY.state = _NUMPY_START
            _GLOBAL.set_bit_generator(_NUMPY)  # to take the user's state, and to put it back, takes longer
            with torch.random.fork_rng([device] if on_cuda else []):
                torch.default_generator.manual_seed(0)
                if on_cuda:
                    torch.cuda.manual_seed(0)
                yield
        finally:
            random.setstate(python)
            _GLOBAL.set_bit_generator(numpy)


DEVICES = (torch.cuda, torch.xpu)


@contextmanager
def put_back() -> Iterator[None]:
    """Draw from the generators of the user, of every device in use, and put their states back, also on an error."""
    with ONE_AT_A_TIME:  # not those that a model in another thread draws from
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        devices = [(module, module.get_rng_state_all()) for module in DEVICES if module.is_initialized()]
        mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        with ONE_AT_A_TIME:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            for module, states in devices:
                module.set_rng_state_all(states)
            if mps is not None:
                torch.mps.set_rng_state(mps)
