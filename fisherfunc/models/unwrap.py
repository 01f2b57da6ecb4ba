"""The model inside what training puts around it; nothing of the wrapper is touched."""

import copy
from typing import Any

from torch import nn

WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
"""Data parallelism and torch.compile: by class name, the attribute that holds the model."""
SPLITTING = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose parameters have the names that they have without a wrapper.

    Data parallelism and `torch.compile` are taken off, in any order, and so is the mixed precision that Accelerate puts
    into `forward`: what is left computes in the dtype of its weights.

    Args:
        model: A module, as a training loop has it.

    Raises:
        TypeError: If a wrapper splits the parameters between processes, so that this one has only a part of each.
    """
    inner: Any = model
    while type(inner).__name__ in WRAPPERS:
        inner = getattr(inner, WRAPPERS[type(inner).__name__])
    if type(inner).__name__ in SPLITTING:
        raise TypeError(f"{type(inner).__name__} may split parameters between processes; {_WAY_OUT}")
    for name, parameter in inner.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
            raise TypeError(
                f"parameter {name!r} is split between processes ({type(parameter.data).__name__}); {_WAY_OUT}"
            )
    return _without_autocast(inner)


_WAY_OUT = "gather the weights into an ordinary module and pass that, or compute the spectra of saved checkpoints"


def _without_autocast(model: nn.Module) -> nn.Module:
    """Accelerate keeps the forward that it replaced as `_original_forward`; both lie on the instance."""
    if "_original_forward" not in vars(model):
        return model
    plain = copy.copy(model)
    for name in ("forward", "_original_forward"):
        vars(plain).pop(name, None)
    return plain
