"""Parts with an autograd of their own: Functions, inner gradients, checkpoints, transforms of torch.func."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.laws.parts.pure import Dense


class Sine(torch.autograd.Function):
    """Without `setup_context`, which torch.func needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()


class NumpySine(Sine):
    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return torch.from_numpy(cotangent.detach().numpy() * ctx.saved_tensors[0].detach().cos().numpy())


class Straight(torch.autograd.Function):
    """A gradient that is not the value's: what is computed is what autograd says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * (ctx.saved_tensors[0].abs() < 1)


class WithFunction(Dense):
    def __init__(self, d: int, function: Any) -> None:
        super().__init__(d)
        self.function = function

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.function.apply(self.layer(h))


class RunAgain(torch.autograd.Function):
    """The backward pass runs the module again."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, *params)
        return module(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.module(x), (x, *params), cotangent, allow_unused=True)


class RunsAgain(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(d, d), nn.Tanh())

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + RunAgain.apply(self.inner, h, *self.inner.parameters())


class Checkpointed(Dense):
    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + checkpoint(lambda x: self.layer(x).tanh(), h, use_reentrant=False)


class InnerGradient(Dense):
    """An energy's gradient by the activations, for all samples or where one has a large sum."""

    def __init__(self, d: int, *, rarely: bool) -> None:
        super().__init__(d)
        self.rarely = rarely

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        asked = h.detach().sum((1, 2)) > 1
        if self.rarely and not bool(asked.any()):
            return h
        with torch.enable_grad():
            x = h if h.requires_grad else h.detach().requires_grad_()
            found = torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)[0]
        return torch.where(asked[:, None, None], found, h) if self.rarely else h + found


class SolvesInside(Dense):
    """Steps of gradient descent on a state, with a graph, as an equilibrium or a memory at test time does."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        with torch.enable_grad():
            z = torch.zeros_like(h).requires_grad_()
            for _ in range(2):
                energy = (z - self.layer(h) - 0.1 * z.sin()).square().sum()
                z = z - 0.2 * torch.autograd.grad(energy, z, create_graph=True)[0]
        return z + h


class Transformed(Dense):
    """A transform of torch.func inside."""

    def __init__(self, d: int, transform: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
        super().__init__(d)
        self.transform = transform

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.transform(lambda x: self.layer(x).tanh(), h)


class HooksGradient(Dense):
    """A hook on an activation changes its gradient."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h).tanh()
        if y.requires_grad:
            y.register_hook(lambda gradient: 2 * gradient)
        return y + h


class Stops(Dense):
    """Values without their gradient, and a part without a graph."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.layer(h)
        return h * y.cos() + self.layer(h.detach()).tanh()


def jacobian_diagonal(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    rows = h.reshape(-1, h.shape[-1])
    return torch.func.vmap(torch.func.jacrev(f))(rows).diagonal(dim1=1, dim2=2).reshape(h.shape)


_TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (torch.ones_like(h),))[1],
    "vjp": lambda f, h: torch.func.vjp(f, h)[1](torch.ones_like(h))[0],
    "grad": lambda f, h: torch.func.grad(lambda x: f(x).square().sum())(h),
    "jacrev": jacobian_diagonal,
    "vmap": lambda f, h: torch.func.vmap(f)(h),
}
DIFFERENTIATING: dict[str, Callable[[int], nn.Module]] = {
    "own function": lambda d: WithFunction(d, Sine),
    "own function in numpy": lambda d: WithFunction(d, NumpySine),
    "straight through": lambda d: WithFunction(d, Straight),
    "runs again": RunsAgain,
    "checkpointed": Checkpointed,
    "inner gradient": lambda d: InnerGradient(d, rarely=False),
    "inner gradient, rarely": lambda d: InnerGradient(d, rarely=True),
    "solves inside": SolvesInside,
    "hooks a gradient": HooksGradient,
    "stops": Stops,
    **{f"torch.func {name}": lambda d, t=transform: Transformed(d, t) for name, transform in _TRANSFORMS.items()},
}
