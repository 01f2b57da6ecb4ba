"""No activation is recomputed in a call of ours.

What `torch.utils.checkpoint(use_reentrant=False)` leaves out of the graph, it computes again in the backward pass, from
whatever the module holds then: its own weights, not those that the function was called with. Gradients at other weights
would be wrong without a sign. In a call of ours the checkpointed part runs as any other does: it takes the memory that
recomputation would save, and no second forward pass. The state here is torch's: names that are replaced while any call
runs, in whichever thread, and then put back.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils import checkpoint

# What checkpoint() runs around the function that it is given: the first in torch 2.15, the second in 2.13, which has no
# first. Whether it is among these shows in its work alone: tests/models/calls/test_recomputation.py.
_NAMES = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
_ORIGINALS = {name: getattr(checkpoint, name) for name in _NAMES if hasattr(checkpoint, name)}
if not _ORIGINALS:
    raise ImportError(
        f"torch {torch.__version__} has neither of {_NAMES} in torch.utils.checkpoint, so that checkpoints would be "
        "computed again at other weights; install an older torch, and report this one"
    )
_lock = threading.Lock()
_depth: dict[int, int] = {}


@contextmanager
def kept_activations() -> Iterator[None]:
    """Inside, in this thread, checkpoints keep what they would compute again."""
    thread = threading.get_ident()
    with _lock:
        _depth[thread] = _depth.get(thread, 0) + 1
        for name, original in _ORIGINALS.items():
            setattr(checkpoint, name, partial(_around, original))
    try:
        yield
    finally:
        with _lock:
            _depth[thread] -= 1
            if not _depth[thread]:
                del _depth[thread]
            if not _depth:
                for name, original in _ORIGINALS.items():
                    setattr(checkpoint, name, original)


def _around(original: Callable[..., Iterator[None]], *args: Any, **kwargs: Any) -> Iterator[None]:
    """Nothing around the function in a call of ours; what torch has in any other thread."""
    if threading.get_ident() in _depth:
        yield
    else:
        yield from original(*args, **kwargs)
