"""BackPACK: individual gradients by `BatchGrad` in one backward pass (one a class for all classes); then the Grams."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders.common import CannotError, Options, Work, work_of_rows
from benchmarks.tasks import Task


def prepare(task: Task, options: Options) -> Work:
    """`BatchGrad` on a task."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    named = dict(task.model.named_parameters())
    model, loss = extend(task.model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def backward(scalar: Tensor) -> dict[str, Tensor]:
        scalar.backward()
        return {name: p.grad_batch.flatten(1) for name, p in named.items()}

    def clear() -> None:
        for p in named.values():
            p.grad = None
            del p.grad_batch

    def rows() -> dict[str, Tensor]:
        with backpack(BatchGrad()):
            if task.kind != "classes":
                found = backward(loss(model(task.inputs), task.targets))
                clear()
                return found
            count = task.num_classes
            held = {name: torch.empty(len(task.inputs), count, p.numel()) for name, p in named.items()}
            for c in range(count):  # a forward pass each: it drops what it saved
                for name, gradients in backward(model(task.inputs)[:, c].sum()).items():
                    held[name][:, c] = gradients
                clear()
        return {name: g.flatten(0, 1) for name, g in held.items()}

    if task.kind == "causal_lm":
        raise CannotError(_trial(backpack, BatchGrad, model, task.small()))
    return work_of_rows(task, options, rows)


def _trial(backpack: Any, extension: Any, model: nn.Module, task: Task) -> str:
    """What happens on a language model, by trying: which modules' parameters get no individual gradients."""
    rows = "BatchGrad's rows are sequences (the batch axis), not tokens"
    try:
        with warnings.catch_warnings(), backpack(extension()):
            warnings.simplefilter("ignore")  # it warns of each module; they are named below
            logits = model(input_ids=task.inputs, use_cache=False).logits[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), task.targets.flatten(), reduction="sum").backward()
    except (NotImplementedError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}; and {rows}"
    without = {
        type(module).__name__
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if not hasattr(p, "grad_batch")
    }
    return f"no individual gradients of {', '.join(sorted(without))}; and {rows}" if without else rows
