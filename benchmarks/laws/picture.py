"""Everything that a call must leave as it was, bit by bit: of a module, of a batch, of random generators."""

import hashlib
import random
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


def picture(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What can be compared with `==`, by where it is."""
    found: dict[str, Any] = {}
    _look("module", model, found, set())
    _look("batch", batch.dataset.tensors if isinstance(batch, DataLoader) else batch, found, set())
    found["torch's generator"] = _digest(torch.get_rng_state())
    found["Python's generator"] = random.getstate()
    found["NumPy's generator"] = str(np.random.get_state())
    found["gradients are recorded"] = torch.is_grad_enabled()
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Where two pictures differ."""
    return sorted(key for key in {*before, *after} if key not in before or before[key] != after.get(key))


def _look(path: str, value: Any, found: dict[str, Any], seen: set[int]) -> None:
    if isinstance(value, type | types.FunctionType | types.ModuleType | torch.dtype | torch.Generator):
        found[path] = id(value)
        return
    if isinstance(value, Tensor | np.ndarray):
        found[path] = (id(value), _digest(value))
        if isinstance(value, Tensor):
            found[f"{path} is"] = (value.requires_grad, type(value), value.data_ptr(), value._backward_hooks is None)
            if value.is_leaf and value.grad is not None:
                found[f"{path}.grad"] = (id(value.grad), _digest(value.grad))
        return
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.Size):
        found[path] = value
        return
    found[path] = (type(value), id(value))
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        found[f"{path} keys"] = list(value)
        for key, entry in value.items():
            _look(f"{path}[{key!r}]", entry, found, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        found[f"{path} length"] = len(value)
        for place, entry in enumerate(value):
            _look(f"{path}[{place}]", entry, found, seen)
    if hasattr(value, "__dict__"):
        found[f"{path} has"] = list(vars(value))
        for name, entry in vars(value).items():
            _look(f"{path}.{name}", entry, found, seen)
    for name in getattr(type(value), "__slots__", ()):
        _look(f"{path}.{name}", getattr(value, name, None), found, seen)


def _digest(value: Tensor | np.ndarray) -> tuple[Any, ...]:
    array = value.detach().contiguous().numpy() if isinstance(value, Tensor) else value
    return array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()
