"""Tensors whose memory is a file, so that the system may take it back under pressure; the values are the same.

A file loses its name as soon as it is mapped: it goes when its tensor does, or its process, however that ends. Its room
is reserved first, as a disk that is full would otherwise kill the process (SIGBUS) at some later write.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor


def spilling(folder: str | os.PathLike[str]) -> Callable[[Sequence[int], Tensor], Tensor]:
    """A function (shape, like) → an unset tensor of the dtype of `like`, in a file of its own in the folder.

    The folder is made where it is missing.

    Raises:
        OSError: If files cannot be written there.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f"spill={str(path)!r} cannot be written ({error.strerror}); give another folder") from error

    def empty(shape: Sequence[int], like: Tensor) -> Tensor:
        if like.device.type != "cpu":
            raise ValueError(f"spill is for passes on a CPU, and this one is on {like.device}; leave it out")
        count = prod(shape)
        if count == 0:
            return like.new_empty(shape)
        return _mapped(path, count, like.dtype).view(tuple(shape))

    return empty


def _mapped(folder: Path, count: int, dtype: torch.dtype) -> Tensor:
    handle, name = tempfile.mkstemp(dir=folder, prefix=".spill-")
    try:
        _reserve(handle, count * dtype.itemsize, folder)
        return torch.from_file(name, shared=True, size=count, dtype=dtype)
    finally:
        os.close(handle)
        os.unlink(name)


def _reserve(handle: int, size: int, folder: Path) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"spill={str(folder)!r} has no room for {size} bytes, {free} are free ({error.strerror}); "
            "give a folder on another disk, or leave spill out"
        ) from error
