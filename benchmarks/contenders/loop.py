"""The loop: one forward pass a sequence or sample, one ordinary backward pass a row, rows held; then the Grams."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.contenders.common import Options, Work, work_of_rows, work_of_some_rows
from benchmarks.tasks import Task


def prepare(task: Task, options: Options) -> Work:
    """The loop on a task."""
    named = dict(task.model.named_parameters())
    parameters = list(named.values())

    def rows() -> dict[str, Tensor]:
        found = {name: p.new_empty(task.num_rows, p.numel(), requires_grad=False) for name, p in named.items()}
        for row, gradients in enumerate(gradients_of(task, range(task.num_rows), parameters)):
            for held, gradient in zip(found.values(), gradients, strict=True):
                held[row] = gradient.flatten()
        return found

    def backward(losses: Tensor, places: list[int]) -> list[list[Tensor]]:
        return [list(torch.autograd.grad(losses[place], parameters, retain_graph=True)) for place in places]

    if options.rows is not None:
        return work_of_some_rows(task, options.rows, lambda sequence: losses_of(task, sequence), backward)
    return work_of_rows(task, options, rows)


def gradients_of(task: Task, rows: range | tuple[int, ...], parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """A gradient a parameter, for one row after the other; rows of a sequence share its forward pass."""
    sequence, losses = -1, torch.empty(0)
    for row in rows:
        if row // task.rows_a_sequence != sequence:
            sequence = row // task.rows_a_sequence
            losses = losses_of(task, sequence)
        keep = (row + 1) % task.rows_a_sequence > 0
        loss = losses[row % task.rows_a_sequence]
        yield list(torch.autograd.grad(loss, parameters, retain_graph=keep, materialize_grads=True))


def losses_of(task: Task, sequence: int) -> Tensor:
    """The rows' scalars of one sequence or sample, by one forward pass."""
    inputs, targets = task.inputs[sequence : sequence + 1], task.targets[sequence : sequence + 1]
    if task.kind == "causal_lm":
        logits = task.model(input_ids=inputs, use_cache=False).logits[0, :-1]
        return functional.cross_entropy(logits, targets[0], reduction="none")
    logits = task.model(inputs)
    return logits[0] if task.kind == "classes" else functional.cross_entropy(logits, targets, reduction="none")
