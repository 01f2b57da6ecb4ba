"""Operations whose derivatives torch cannot take forwards, or not twice, or takes wrongly; and a layer around one."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class NoForwardMode(torch.autograd.Function):
    """tanh with a backward pass that can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    def backward(ctx, cotangent):
        (y,) = ctx.saved_tensors
        return cotangent * (1 - y**2)


class BackwardOnly(NoForwardMode):
    """tanh that can be differentiated once."""

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        (y,) = ctx.saved_tensors
        return cotangent * (1 - y**2)


class WrongForwardMode(torch.autograd.Function):
    """tanh whose forward-mode derivative is off by a factor."""

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, cotangent):
        (y,) = ctx.saved_tensors
        return cotangent * (1 - y**2)

    @staticmethod
    def jvp(ctx, tangent):
        (y,) = ctx.saved_tensors
        return 1.5 * tangent * (1 - y**2)


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent


class Reversed(torch.autograd.Function):
    """The layer of domain-adversarial training."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, cotangent):
        return -cotangent


class Clipped(Reversed):
    """Gradients that are clipped on their way."""

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent.clamp(-0.01, 0.01)


class WithoutGradient:
    """Half of what it is given, without gradients."""

    @staticmethod
    def apply(x):
        with torch.no_grad():
            half = x.sin()
        return x + half


class By(nn.Module):
    """A layer, an operation, a head."""

    def __init__(self, operation):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.operation = nn.Linear(4, 5), nn.Linear(5, 3), operation

    def forward(self, x):
        return self.head(self.operation.apply(self.layer(x)))
