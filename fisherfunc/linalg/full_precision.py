"""Products of float32 numbers in float32: torch may round their factors to fewer bits, and says so nowhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_CUDNN = torch.backends.cudnn


@contextmanager
def full_precision() -> Iterator[None]:
    """No TensorFloat-32 and no bfloat16 in products of float32 inside, whatever was set; that is put back.

    Convolutions on a GPU would use 10 bits of each factor by default, and matrix products where a user asked for it: a
    relative error of 1e-3 in what is exact up to 1e-7. A pass of less precision is asked for by its dtype.
    """
    named = _named()
    before = [setting.fp32_precision for setting in named]
    products, convolutions = _legacy(torch.get_float32_matmul_precision), _legacy(lambda: _CUDNN.allow_tf32)
    try:
        torch.set_float32_matmul_precision("highest")
        _CUDNN.allow_tf32 = False
        for setting in named:
            setting.fp32_precision = "ieee"
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            _CUDNN.allow_tf32 = convolutions
        for setting, value in zip(named, before, strict=True):
            setting.fp32_precision = value


def _legacy(setting: Callable[[], Any]) -> Any:
    """A setting of torch's older interface; None where it contradicts the newer one, and torch does not tell it."""
    with suppress(RuntimeError):
        return setting()
    return None


def _named() -> list[Any]:
    """The settings of the newer interface, by kind of operation; there is none before torch 2.9."""
    cpu: Any = torch.backends.mkldnn
    if not hasattr(_CUDNN, "conv"):
        return []
    return [torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn, cpu.matmul, cpu.conv, cpu.rnn]
