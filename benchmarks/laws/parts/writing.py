"""Parts that write to their own weights: in `forward`, or where `train(False)` folds an update into them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters


class Writes(nn.Module):
    """A forward pass that writes to a weight, trained or frozen."""

    def __init__(self, d: int, write: Callable[[nn.Parameter, Tensor], object], *, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, d), requires_grad=not frozen)
        self.write = write

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.weight, h)
        return h + (h @ self.weight).tanh()


class Folds(nn.Linear):
    """`train(False)` folds a low-rank update into a frozen weight, and `train()` takes it out."""

    def __init__(self, d: int, fold: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__(d, d)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, d)), nn.Parameter(torch.randn(d, 2))
        self.fold, self.folded = fold, False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode == self.folded:
            self.fold(self, (-1 if mode else 1) * (self.b @ self.a).detach())
            self.folded = not mode
        return self

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = super().forward(h)
        return (y if self.folded else y + h @ self.a.T @ self.b.T).tanh()


class CountsSwitches(nn.Linear):
    """`train` is counted, and what a call in training mode left is thrown away by it."""

    def __init__(self, d: int) -> None:
        super().__init__(d, d)
        self.switches, self.kept = 0, {"a": 1.0}

    def train(self, mode: bool = True) -> nn.Module:
        self.switches += 1
        self.kept.clear()
        return super().train(mode)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return super().forward(h).tanh()


def halve_some(weight: Tensor, h: Tensor) -> None:
    if h.sum() > 0:
        weight.mul_(0.5)


def halve_if_long(weight: Tensor, h: Tensor) -> None:
    if h.shape[1] > 2:
        weight.mul_(0.5)


_WRITES: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "in place": lambda weight, h: weight.div_(weight.norm(dim=1, keepdim=True)),
    "through data": lambda weight, h: weight.data.clamp_(-0.5, 0.5),
    "an entry": lambda weight, h: weight.__setitem__(0, 0.0),
    "a view": lambda weight, h: weight.T[1:3].zero_(),
    "copied": lambda weight, h: weight.copy_(weight.sign()),
    "by foreach": lambda weight, h: torch._foreach_mul_([weight], 0.5),
    "out": lambda weight, h: torch.sin(weight, out=weight),
    "as a vector": lambda weight, h: vector_to_parameters(weight.flatten() / 2, [weight]),
    "through numpy": lambda weight, h: weight.detach().numpy().__imul__(0.5),
    "where asked": halve_some,
    "if long": halve_if_long,
}
_FOLDS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "data in place": lambda layer, update: layer.weight.data.add_(update),
    "data replaced": lambda layer, update: setattr(layer.weight, "data", layer.weight.data + update),
    "parameter replaced": lambda layer, update: setattr(layer, "weight", nn.Parameter(layer.weight + update, False)),
}
WRITING: dict[str, Callable[[int], nn.Module]] = {
    **{f"writes {name}": partial(Writes, write=write) for name, write in _WRITES.items()},
    **{f"writes frozen {name}": partial(Writes, write=write, frozen=True) for name, write in _WRITES.items()},
    **{f"folds, {name}": partial(Folds, fold=fold) for name, fold in _FOLDS.items()},
    "counts switches": CountsSwitches,
}
