"""Parts that keep something between calls: caches, states, counters, tables; a user's module has it as it was left."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.laws.parts.pure import Dense


class Slotted:
    """Attributes without a `__dict__`."""

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}


class Caches(nn.Module):
    """A value made of a parameter, kept in evaluation mode by a dictionary, an object, or the module itself."""

    def __init__(self, d: int, keep_in: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(d))
        self.kept = keep_in(self)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        if self.training:
            return h + self.bias.cumsum(0)
        store = self.kept if isinstance(self.kept, dict) else getattr(self.kept, "held", None)
        store = vars(self.kept or self) if store is None else store
        if "value" not in store:
            store["value"] = self.bias.cumsum(0)
        return h + store["value"]


class CachesByLength(Dense):
    """A table made of a weight, for each length that was met."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.tables: dict[int, Tensor] = {}

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        s = h.shape[1]
        if s not in self.tables:
            self.tables[s] = self.layer.weight.sum(0) * torch.arange(1, s + 1).to(h)[:, None]
        return (h + self.tables[s]).tanh() + self.layer(h)


class GoesOn(Dense):
    """The last activations of the call before are added to those of this one: detached, or in the graph."""

    def __init__(self, d: int, *, detached: bool) -> None:
        super().__init__(d)
        self.state: Tensor | None = None
        self.detached = detached

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h).tanh()
        if self.state is not None:
            y = y + self.state.mean(0)
        self.state = y[:, -1:].detach() if self.detached else y[:, -1:]
        return y


class Accumulates(Dense):
    """A state in a tensor that is written to in place, after its use."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.state = torch.zeros(d, dtype=torch.float64)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h).tanh() + self.state.clone()
        self.state += h.detach().mean((0, 1)) + 0.5
        return y


class Counts(Dense):
    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.calls = 0

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(h).tanh() * self.calls + h


class AppendsToList(Dense):
    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.seen: list[Any] = [{"x": [0.5]}]

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        self.seen.append(h)
        self.seen[0]["x"].append(1.0)
        return self.layer(h).tanh() * sum(self.seen[0]["x"]) / len(self.seen)


class GrowsTable(Dense):
    """A buffer that is replaced by a longer one, and the attribute that says how far it goes."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.length = 0
        self.register_buffer("table", torch.zeros(0, dtype=torch.float64), persistent=False)

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        if self.length < h.shape[1]:
            self.length = h.shape[1]
            self.register_buffer("table", torch.arange(1, self.length + 1).to(h), persistent=False)
        return self.layer(h).tanh() + self.table[: h.shape[1], None].cos()


class WritesBuffer(Dense):
    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("scale", torch.ones(d))

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        self.steps += 1
        self.scale.mul_(0.9)
        self.scale[0] = self.steps
        return self.layer(h * self.scale).tanh()


class Configured(Dense):
    """An object that a configuration holds is changed by each call."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.config = SimpleNamespace(inner=SimpleNamespace(scale=1.0), history=[])

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        self.config.inner.scale *= 1.5
        self.config.history.append(h.shape)
        return self.layer(h).tanh() * self.config.inner.scale


class AddsHook(Dense):
    """A hook that is added at each call counts double the next time."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        self.layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
        return self.layer(h).tanh()


class AddsPart(Dense):
    """A module and a parameter that are made at the first call."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.made: nn.Module | None = None

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        if self.made is None:
            self.made = nn.LayerNorm(h.shape[-1], dtype=h.dtype)
        else:
            h = 2 * h
        return self.layer(self.made(h))


class ReplacesForward(Dense):
    """The first call sets the method that later ones use."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h).tanh()
        self.forward = lambda h, keep: y.mean(0) + h
        return y


KEEPING: dict[str, Callable[[int], nn.Module]] = {
    "cached in a dictionary": lambda d: Caches(d, lambda module: {}),
    "cached in an object": lambda d: Caches(d, lambda module: SimpleNamespace()),
    "cached in slots": lambda d: Caches(d, lambda module: Slotted()),
    "cached in an attribute": lambda d: Caches(d, lambda module: None),
    "cached by length": CachesByLength,
    "goes on, detached": lambda d: GoesOn(d, detached=True),
    "goes on": lambda d: GoesOn(d, detached=False),
    "accumulates": Accumulates,
    "counts": Counts,
    "appends to a list": AppendsToList,
    "grows a table": GrowsTable,
    "writes a buffer": WritesBuffer,
    "configured": Configured,
    "adds a hook": AddsHook,
    "adds a part": AddsPart,
    "replaces its forward": ReplacesForward,
}
