"""ViViT: the spectrum of the GGN through its Gram. Its square loss makes the GGN that of the logits' tangent kernel."""

import warnings

import torch
from torch import Tensor, nn

from benchmarks.contenders.common import FULL, Answer, CannotError, Options, Work
from benchmarks.tasks import Task


def prepare(task: Task, options: Options) -> Work:
    """The full spectrum of the tangent kernel, where that is the task."""
    if task.kind != "classes":
        reason = "the spectrum of the GGN (all classes a sample, or a drawn target), not of the empirical Fisher"
        raise CannotError(f"{reason}, by its documentation")
    from backpack import backpack, extend
    from vivit import EigvalshComputation

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    model, loss = extend(task.model), extend(nn.MSELoss(reduction="mean"))
    group = {"params": list(task.model.parameters())}
    # mean((f - y)²) over N · C entries has the Hessian 2/(N C) I, so the GGN is 2/(N C) JᵀJ and F = JᵀJ/(N C).
    half = 2.0

    def run() -> Tensor:
        computation = EigvalshComputation()
        hook = computation.get_extension_hook([group])
        with backpack(computation.get_extension(), extension_hook=hook):
            loss(model(task.inputs), torch.zeros(len(task.inputs), task.num_classes)).backward()
        return computation.get_result(group)

    return Work(
        run=run,
        answer=lambda values: Answer(spectra={FULL: values.double().sort(descending=True).values / half}),
        gives="spectrum of the full matrix",
    )
