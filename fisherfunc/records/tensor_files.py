"""Files of tensors that know whether they are whole: safetensors, written atomically, with a checksum; no pickle."""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherfunc.records.storage import replacing


class DamagedError(ValueError):
    """A file is not what `write_tensors` wrote."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Any) -> None:
    """Write tensors and a header of plain values, whole or not at all.

    Args:
        path: The file; its folder must exist.
        tensors: Each is stored whole, also where two share memory.
        header: What JSON can hold.

    Raises:
        OSError: If the file cannot be written.
    """
    text = json.dumps(header)
    whole = apart({name: tensor.cpu() for name, tensor in tensors.items()})
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata={"header": text, "checksum": str(_checksum(text, whole))})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}; what was written before is kept") from error
        _flush(temporary)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the header of a file, on the CPU.

    Raises:
        FileNotFoundError: If there is none.
        DamagedError: If it is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            info = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    text = info.get("header", "")
    if info.get("checksum") != str(_checksum(text, tensors)):
        raise DamagedError(f"{path} is damaged (its checksum is another)")
    return tensors, json.loads(text)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share a storage: safetensors refuses those."""
    storages: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous()
        own = own.clone() if own.untyped_storage().data_ptr() in storages else own
        storages.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor as they lie in memory, in the order of its axes."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.cpu().contiguous().resolve_conj().resolve_neg().flatten().view(torch.uint8).numpy().data


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> int:
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        found = zlib.crc32(bytes_of(tensors[name]), zlib.crc32(name.encode(), found))
    return found


def _flush(path: Path) -> None:
    """To the disk, before the rename: a file that is there after a power cut is whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
