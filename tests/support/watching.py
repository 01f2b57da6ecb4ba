"""Everything that a call must leave as it was: of a module, and of torch's global state."""

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Modes, flags, identities, values, hooks, attributes, `.grad`, generators and backend switches; copies."""
    modules = list(model.modules())
    return {
        "mode": [module.training for module in modules],
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {n: (id(t), t.data_ptr()) for n, t in _tensors(model).items()},
        "values": {name: t.detach().clone() for name, t in _tensors(model).items()},
        "hooks": [
            [list(vars(module)[kind].items()) for kind in vars(module) if kind.endswith("hooks")] for module in modules
        ],
        "attributes": [_frozen({k: v for k, v in vars(m).items() if not k.startswith("_")}) for m in modules],
        "config": repr(getattr(model, "config", None)),
        "grad": {n: (id(p.grad), _frozen(p.grad)) for n, p in model.named_parameters()},
        "generator": torch.get_rng_state(),
        "switches": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.are_deterministic_algorithms_enabled(),
        ),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two snapshots, bit by bit."""
    return [key for key in before if not _equal(before[key], after[key])]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _frozen(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
