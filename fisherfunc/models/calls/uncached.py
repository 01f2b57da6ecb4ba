"""Weights that a parametrisation computes are computed anew in a call of ours.

Inside `parametrize.cached()` torch keeps what it computed once. A call at other parameters would go on with the old
ones, and no gradient would reach those that they are computed from. The state is torch's, one for all threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.utils import parametrize


@contextmanager
def uncached() -> Iterator[None]:
    """Inside, no weight is taken from the cache of `parametrize.cached()`, nor put there."""
    before = parametrize._cache_enabled, parametrize._cache  # fails at the first call where torch has no such names
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = before
