"""Parts in which the samples of a batch meet: in what they compute, or only in gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.laws.parts.pure import Dense, Normalised


class MeanOfBatch(Dense):
    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h).tanh()
        return y - y.mean(0, keepdim=True) + h


class MeetsInGradients(Dense):
    """The mean over the batch has value zero, and a gradient."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h).tanh()
        mean = y.mean(0, keepdim=True)
        return y + (mean - mean.detach())


class AttendsToBatch(Dense):
    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        pooled = self.layer(h).mean(1)
        return h + ((pooled @ pooled.T).softmax(-1) @ pooled)[:, None]


class ScalesGradients(Dense):
    """The gradient is divided by the number of samples."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        y = self.layer(h).tanh()
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / len(gradient))
        return y + h


class Counted(Dense):
    """By the number of samples."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return self.layer(h).tanh() * len(h)


class Shuffles(Dense):
    """Each sample gets something of the next."""

    def forward(self, h: Tensor, keep: Tensor) -> Tensor:
        return h + self.layer(torch.roll(h, 1, 0)).tanh()


MEETING: dict[str, Callable[[int], nn.Module]] = {
    "mean of the batch": MeanOfBatch,
    "meets in gradients": MeetsInGradients,
    "attends to the batch": AttendsToBatch,
    "scales gradients": ScalesGradients,
    "counted": Counted,
    "batch norm without statistics": lambda d: Normalised(d, nn.BatchNorm1d(d, track_running_stats=False)),
    "shuffles": Shuffles,
}
