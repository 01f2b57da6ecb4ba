"""Modules that a loop of backward passes takes in its stride: five inputs, three classes, float64."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import fisherfunc as ff

BATCH_SIZE = 4


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH_SIZE, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


class Body(nn.Module):
    """A layer, a head, and whatever a subclass does between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.between(torch.tanh(self.layer(x)))))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x


class TwoNames(Body):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.layer

    def between(self, x):
        return self.again(x)


class Static(nn.Module):
    @staticmethod
    def forward(x):
        return x * torch.sigmoid(x)


class StaticInside(Body):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Static()

    def between(self, x):
        return self.inside(x)


class CopiedInside(Body):
    """A layer whose copy runs with another weight."""

    def between(self, x):
        other = copy.deepcopy(self.head)
        other._parameters.clear()
        other.weight, other.bias = 2 * self.layer.weight, self.layer.bias
        return other(x)


class CompiledInside(Body):
    def __init__(self) -> None:
        super().__init__()
        self.inside = torch.compile(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), backend="eager")

    def between(self, x):
        return self.inside(x)


class TiedParameter(Body):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = self.layer.weight

    def between(self, x):
        return x @ self.matrix


class ReadByParent(Body):
    def between(self, x):
        return functional.linear(x, self.layer.weight)


class InAPythonList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.layer]

    def between(self, x):
        return self.layers[0](x)


class CountingBuffer(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))

    def between(self, x):
        self.steps += 1
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x


class CountingAttributes(Body):
    """Plain attributes: a tensor written in place, one in a container, a number, an output that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.store, self.calls, self.last = torch.zeros(()), {"k": torch.zeros(2)}, 0, None

    def between(self, x):
        self.steps += 1
        self.store["k"] += 1
        self.calls += 1
        self.last = x
        return x


class OddShapes(Body):
    """No entries, no axes, not contiguous, stride zero, complex, integer, unused."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.transposed = nn.Parameter(torch.randn(3, 5).T)
        self.unused = nn.Parameter(torch.ones(2))
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.cfloat), requires_grad=False)
        self.shift = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)

    def forward(self, x):
        return super().forward(x) * self.scalar + x @ self.transposed * self.phase.real[0] + self.empty.sum()

    def between(self, x):
        return x + self.shift[1]


class WithoutSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * ctx.saved_tensors[0].cos()


class ThroughNumpy(WithoutSetupContext):
    @staticmethod
    def backward(ctx, cotangent):
        return cotangent.new_tensor(cotangent.cpu().numpy() * ctx.saved_tensors[0].cos().cpu().numpy())


class OwnFunction(Body):
    def between(self, x):
        return WithoutSetupContext.apply(x)


class OwnNumpyFunction(Body):
    def between(self, x):
        return ThroughNumpy.apply(x)


class DataDependent(Body):
    def between(self, x):
        x = x * 2 if x.sum().item() > 0 else x
        return x * (1 + int(x[0].argmax())) * float(x.detach().cpu().numpy().sum())


class InPlace(Body):
    def forward(self, x):
        x += 1
        hidden = self.layer(x).clone()
        hidden[:, 0] = hidden[:, 1] * 2
        return self.head(hidden.add_(1)) + x[:, :3]


class InnerGradient(Body):
    def between(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.layer(x).tanh().sum(), x, create_graph=True)[0]


class Adapter(Body):
    """A frozen layer with a trainable update of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(5, 2))

    def between(self, x):
        return x + x @ self.down.T @ self.up.T


class Lookup(nn.Module):
    """An embedding of ids made from the inputs."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.table, self.head = make(), nn.Linear(4, 3)

    def forward(self, x):
        rows = self.table((x * 3).long().abs() % 7)
        return self.head(torch.tanh(rows.mean(1) if rows.ndim == 3 else rows))


class Square(nn.Module):
    def forward(self, x):
        return x * x


def squared_weight() -> nn.Module:
    model = perceptron()
    parametrize.register_parametrization(model[0], "weight", Square())
    return model


def spectral() -> nn.Module:
    model = perceptron()
    parametrizations.spectral_norm(model[0])
    return model.eval()


def hooked() -> nn.Module:
    """Hooks that are part of the function."""
    model = perceptron()
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model[2].register_forward_hook(lambda module, inputs, output: output * 3)
    return model


def recorded() -> nn.Module:
    """Hooks that only look."""
    model = perceptron()
    model.seen = []
    model[0].register_forward_hook(lambda module, inputs, output: None)
    model[2].register_full_backward_hook(lambda module, inputs, outputs: None)
    model[0].weight.register_hook(lambda gradient: gradient * 0)
    return model


def in_training() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double().train()
    model[1].eval()
    return model


def with_gradients() -> nn.Module:
    model = perceptron()
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(3, dtype=torch.float64)
    return model


ODD: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: lambda kind=kind: kind().double()
    for kind in (
        TwoNames,
        StaticInside,
        CopiedInside,
        CompiledInside,
        TiedParameter,
        ReadByParent,
        InAPythonList,
        CountingBuffer,
        CountingAttributes,
        OddShapes,
        OwnFunction,
        OwnNumpyFunction,
        DataDependent,
        InPlace,
        InnerGradient,
        Adapter,
    )
} | {
    "squared_weight": squared_weight,
    "spectral": spectral,
    "hooked": hooked,
    "recorded": recorded,
    "in_training": in_training,
    "with_gradients": with_gradients,
    "sparse": lambda: Lookup(lambda: nn.Embedding(7, 4, sparse=True)).double(),
    "padding": lambda: Lookup(lambda: nn.Embedding(7, 4, padding_idx=0)).double(),
    "max_norm": lambda: Lookup(lambda: nn.Embedding(7, 4, max_norm=1.0)).double(),
    "compiled": lambda: torch.compile(perceptron(), backend="eager"),
}


COUNT, RARE = 24, (9, 20)


def rare_samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Some samples, of which two have a first entry above 1.5; neither is at an end."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 5, generator=generator, dtype=torch.float64)
    x[:, 0] = -x[:, 0].abs()
    x[list(RARE), 0] = 2.0
    return x, torch.randint(3, (COUNT,), generator=generator)


class Squares(torch.nn.Module):
    """Its gradient x² overflows at a large input, though the loss there is zero."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return ((self.weight * x) * x).sum(-1)


def squares():
    x = torch.tensor([[[1.0, 2.0], [1e30, 0.5], [3.0, 1.0]], [[2.0, 1.0], [1.0, 1.0], [0.5, 4.0]]])
    loss = ff.losses.custom(lambda output, batch: output, name="squares")
    return ff.functionalize(Squares()), (x, torch.zeros(2)), loss
