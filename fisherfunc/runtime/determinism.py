"""Determinism as a context: every global it touches is put back."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(seed: int = 0) -> Iterator[None]:
    """Seed Python's and torch's global generators and let torch use deterministic algorithms only, inside the context.

    `fisher_spectrum` draws nothing from global generators, and lets a model draw from none; this is for GPU kernels
    whose order of summation varies, and for what is around the call. Cost: on a GPU some kernels are slower, and one
    without a deterministic form raises. On entry and exit the states of all generators are copied.

    Args:
        seed: For the global generators.

    Example:
        >>> with deterministic(1):
        ...     first = torch.rand(1)
        >>> with deterministic(1):
        ...     bool(first == torch.rand(1))
        True
    """
    python_state = random.getstate()
    algorithms = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    with torch.random.fork_rng():
        try:
            random.seed(seed)
            torch.manual_seed(seed)
            os.environ[_CUBLAS] = ":4096:8"
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            yield
        finally:
            random.setstate(python_state)
            torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
            _restore_environment(workspace)


def _restore_environment(workspace: str | None) -> None:
    if workspace is None:
        os.environ.pop(_CUBLAS, None)
    else:
        os.environ[_CUBLAS] = workspace
