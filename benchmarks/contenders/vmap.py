"""`vmap(grad)`: gradients of chunks of rows by torch.func, written into rows held; then the Grams.

A language model's sequence has one forward pass (`vjp`), and its pullback is mapped over the tokens; of samples, `grad`
(or `jacrev`, for all logits) is mapped over them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn import functional

from benchmarks.contenders.common import Options, Work, work_of_rows, work_of_some_rows
from benchmarks.tasks import Task

CHUNK_BYTES = 500_000_000

Pullback = Callable[[Tensor], tuple[dict[str, Tensor]]]


def prepare(task: Task, options: Options) -> Work:
    """`vmap(grad)` on a task."""
    if task.kind == "causal_lm":
        task.model.set_attn_implementation("eager")  # the fused backward has no batching rule
    params = {name: p.detach() for name, p in task.model.named_parameters()}
    chunk = max(1, CHUNK_BYTES // (4 * task.num_params))

    def rows() -> dict[str, Tensor]:
        found = {name: p.new_empty(task.num_rows, p.numel()) for name, p in params.items()}
        start = 0
        for piece in _pieces(task, params, chunk):
            stop = start + len(next(iter(piece.values())))
            for name, gradients in piece.items():
                found[name][start:stop] = gradients.flatten(1)
            start = stop
        return found

    def backward(pullback: Pullback, places: list[int]) -> list[list[Tensor]]:
        pieces = list(_pulled(pullback, _cotangents(task)[places], max(2, chunk)))
        return [list(row) for piece in pieces for row in zip(*piece.values(), strict=True)]

    if options.rows is not None:
        return work_of_some_rows(task, options.rows, lambda sequence: _pullback(task, params, sequence), backward)
    return work_of_rows(task, options, rows)


def _pieces(task: Task, params: dict[str, Tensor], chunk: int) -> Iterator[dict[str, Tensor]]:
    """Gradients `{name: (chunk, *shape)}` of consecutive rows."""
    if task.kind == "causal_lm":
        for sequence in range(len(task.inputs)):
            yield from _pulled(_pullback(task, params, sequence), _cotangents(task), chunk)
    elif task.kind == "classes":
        yield from _logits(task, params, max(1, chunk // task.num_classes))
    else:
        one = vmap(grad(lambda p, x, y: _loss(task, p, x, y)), in_dims=(None, 0, 0))
        for x, y in zip(task.inputs.split(chunk), task.targets.split(chunk), strict=True):
            yield one(params, x, y)


def _pullback(task: Task, params: dict[str, Tensor], sequence: int) -> Pullback:
    """From cotangents of a sequence's losses to gradients, after its one forward pass."""
    ids, targets = task.inputs[sequence : sequence + 1], task.targets[sequence]

    def losses(p: dict[str, Tensor]) -> Tensor:
        logits = functional_call(task.model, p, (), {"input_ids": ids, "use_cache": False}).logits
        return functional.cross_entropy(logits[0, :-1], targets, reduction="none")

    return vjp(losses, params)[1]


def _cotangents(task: Task) -> Tensor:
    """A token's loss each."""
    return torch.eye(task.rows_a_sequence, device=task.device)


def _pulled(pullback: Pullback, cotangents: Tensor, chunk: int) -> Iterator[dict[str, Tensor]]:
    for piece in cotangents.split(chunk):
        yield vmap(pullback)(piece)[0]


def _logits(task: Task, params: dict[str, Tensor], chunk: int) -> Iterator[dict[str, Tensor]]:
    jacobian = vmap(jacrev(lambda p, x: functional_call(task.model, p, (x[None],))[0]), in_dims=(None, 0))
    for x in task.inputs.split(chunk):
        yield {name: j.flatten(0, 1) for name, j in jacobian(params, x).items()}


def _loss(task: Task, params: dict[str, Tensor], x: Tensor, y: Any) -> Tensor:
    return functional.cross_entropy(functional_call(task.model, params, (x[None],)), y[None])
