"""Products of float32 numbers in float32: torch may round their factors to fewer bits, and says so nowhere."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

_CUDNN = torch.backends.cudnn
DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Those that autocast may be on for."""


@contextmanager
def full_precision() -> Iterator[None]:
    """No TensorFloat-32, no bfloat16 in products of float32 and no autocast inside, whatever was set; that is put back.

    Convolutions on a GPU would use 10 bits of each factor by default, and matrix products where a user asked for it: a
    relative error of 1e-3 in what is exact up to 1e-7. A pass of less precision is asked for by its dtype. The settings
    are those of the process: of several threads the first to come in sets them, and the last to leave puts them back.
    """
    with _SHARED.lock, changeable():
        if not _SHARED.inside:
            _SHARED.before = _settings()
            _set_exact()
        _SHARED.inside += 1
    try:
        with ExitStack() as without_autocast:
            for device in DEVICES:
                if torch.is_autocast_enabled(device):
                    without_autocast.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _SHARED.lock, changeable():
            _SHARED.inside -= 1
            if not _SHARED.inside:
                _put_back(*_SHARED.before)


def changeable() -> AbstractContextManager[None]:
    """Settings of torch's backends can be changed inside, also after `torch.backends.disable_global_flags()`."""
    return getattr(torch.backends, "__allow_nonbracketed_mutation", nullcontext)()


@dataclass
class _Shared:
    """Among threads: how often the context was entered and not left, and what was set before."""

    lock: Any
    inside: int = 0
    before: tuple[Any, Any, list[str]] = (None, None, [])


_SHARED = _Shared(lock=Lock())


def named() -> list[Any]:
    """The settings of torch's newer interface, by kind of operation; there is none before torch 2.9."""
    cpu: Any = torch.backends.mkldnn
    if not hasattr(_CUDNN, "conv"):
        return []
    return [torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn, cpu.matmul, cpu.conv, cpu.rnn]


def _settings() -> tuple[Any, Any, list[str]]:
    products, convolutions = _legacy(torch.get_float32_matmul_precision), _legacy(lambda: _CUDNN.allow_tf32)
    return products, convolutions, [setting.fp32_precision for setting in named()]


def _legacy(setting: Callable[[], Any]) -> Any:
    """A setting of torch's older interface; None where it contradicts the newer one, and torch does not tell it."""
    with suppress(RuntimeError):
        return setting()
    return None


def _set_exact() -> None:
    torch.set_float32_matmul_precision("highest")
    _CUDNN.allow_tf32 = False
    for setting in named():
        setting.fp32_precision = "ieee"


def _put_back(products: Any, convolutions: Any, by_kind: list[str]) -> None:
    if products is not None:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        _CUDNN.allow_tf32 = convolutions
    for setting, value in zip(named(), by_kind, strict=True):
        setting.fp32_precision = "none"  # what is set for all kinds, if anything is
        if setting.fp32_precision != value:
            setting.fp32_precision = value
