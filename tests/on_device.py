"""All tests on a GPU: `FISHERFUNC_TEST_DEVICE=cuda python -m pytest tests`.

What the tests make, models included, then lies on that device; what the package makes lies where the package says, and
what models make while it runs them, on the CPU, as for any user.
"""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("FISHERFUNC_TEST_DEVICE", "cpu")
TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "fisherfunc"


class OnDevice(TorchFunctionMode):
    """Tensors that tests, or what they call, make without saying where."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None or not _for_tests():
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **{**kwargs, "device": DEVICE})


def _for_tests() -> bool:
    """Whether, of the package and the tests, the tests are nearer in the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        found = _is_of_tests(frame.f_code.co_filename)
        if found is not None:
            return found
        frame = frame.f_back
    return False


@cache
def _is_of_tests(file: str) -> bool | None:
    """None for what is of neither; the package's strategies are part of the tests."""
    path = Path(file)
    if path.is_relative_to(TESTS) or path.is_relative_to(PACKAGE / "testing"):
        return True
    return False if path.is_relative_to(PACKAGE) else None
