"""fisherfunc: `ff.token_grams`, and where spectra are part of the job, what `ff.fisher_spectrum` does with them."""

from typing import Any

import torch
from torch import Tensor

import fisherfunc as ff
from benchmarks.contenders.common import FULL, Answer, Options, Work
from benchmarks.tasks import Task

GIVES = {"tensor": "Grams by tensor", "layer": "Grams by layer", "whole": "Gram of the full matrix"}


def prepare(task: Task, options: Options, *, planned: bool = False) -> Work:
    """The factored route on a task.

    Args:
        task: The task.
        options: How.
        planned: Whether the plan is made now, and is no part of the run.
    """
    loss = loss_of(task)
    dtype = getattr(torch, options.dtype)
    labels = {name: label for label, names in task.blocks.items() for name in names}
    blocks = {"tensor": None, "layer": labels.__getitem__, "whole": ff.whole}[options.blocks]
    plan = None
    if planned:
        how = {"memory_limit": options.memory_limit, "blocks": blocks, "dtype": dtype, "calibrate": False}
        plan = ff.plan(task.model, task.batch, loss=loss, **how)

    def run() -> tuple[Any, Any]:
        fn = ff.functionalize(task.model).to(dtype=dtype)
        grams = ff.token_grams(
            fn, fn.params, task.batch, loss, memory_limit=options.memory_limit, blocks=blocks, plan=plan
        )
        return grams, ff.spectrum_of_grams(grams) if options.spectra else None

    return Work(
        run=run,
        answer=lambda found: _answer(task, *found),
        gives=GIVES[options.blocks] + (", all spectra by layer and of the full matrix" if options.spectra else ""),
    )


def loss_of(task: Task) -> ff.losses.TokenLoss:
    """What the rows of a task are gradients of."""
    losses = {
        "causal_lm": ff.losses.causal_lm(),
        "classification": ff.losses.classification(),
        "classes": ff.losses.custom(lambda output, batch: output, name="logits"),
    }
    return losses[task.kind]


def _answer(task: Task, grams: Any, result: Any) -> Answer:
    parts = {label: (label,) for label in grams.grams if label in task.blocks} if grams.labels else task.blocks
    blocks: dict[str, Tensor] = {label: grams.block(names) for label, names in parts.items()}
    spectra = None
    if result is not None:
        spectra = {label: spectrum.eigenvalues for label, spectrum in result.blocks.items()}
        spectra[FULL] = result.full.eigenvalues
    return Answer(grams={**blocks, FULL: grams.block()}, spectra=spectra)
