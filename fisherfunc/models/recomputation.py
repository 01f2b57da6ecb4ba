"""No activation is recomputed in a call of ours.

What `torch.utils.checkpoint(use_reentrant=False)` leaves out of the graph, it computes again in the backward pass, from
whatever the module holds then: its own weights, not those that the function was called with. Gradients at other weights
would be wrong without a sign. In a call of ours the checkpointed part runs as any other does: it takes the memory that
recomputation would save, and no second forward pass. The state here is torch's: a name that is replaced while any call
runs, in whichever thread, and then put back.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint

_NAME = "_checkpoint_without_reentrant_generator"  # checkpoint() runs it around the function that it is given
_ORIGINAL = getattr(checkpoint, _NAME)  # where torch has no such name, no call is safe: fail at the import
_lock = threading.Lock()
_depth: dict[int, int] = {}


@contextmanager
def kept_activations() -> Iterator[None]:
    """Inside, in this thread, checkpoints keep what they would compute again."""
    thread = threading.get_ident()
    with _lock:
        _depth[thread] = _depth.get(thread, 0) + 1
        setattr(checkpoint, _NAME, _around)
    try:
        yield
    finally:
        with _lock:
            _depth[thread] -= 1
            if not _depth[thread]:
                del _depth[thread]
            if not _depth:
                setattr(checkpoint, _NAME, _ORIGINAL)


def _around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Nothing around the function in a call of ours; what torch has in any other thread."""
    if threading.get_ident() in _depth:
        yield
    else:
        yield from _ORIGINAL(*args, **kwargs)
