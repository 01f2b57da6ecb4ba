"""fisherfunc: `ff.token_grams`, and where spectra are part of the job, what `ff.fisher_spectrum` does with them."""

import inspect
from typing import Any

import torch
from torch import Tensor

import fisherfunc as ff
from benchmarks.contenders.common import FULL, Answer, Options, Work
from benchmarks.tasks import Task


def prepare(task: Task, options: Options) -> Work:
    """The factored route on a task."""
    losses = {
        "causal_lm": ff.losses.causal_lm(),
        "classification": ff.losses.classification(),
        "classes": ff.losses.custom(lambda output, batch: output, name="logits"),
    }
    loss = losses[task.kind]
    dtype = getattr(torch, options.dtype)
    in_pass = {"pass_dtype": dtype} if options.dtype != "float32" and _has_pass_dtype() else {}

    def run() -> tuple[Any, Any]:
        fn = ff.functionalize(task.model).to(dtype=None if in_pass else dtype)
        grams = ff.token_grams(fn, fn.params, task.batch, loss, memory_limit=options.memory_limit, **in_pass)
        return grams, ff.spectrum_of_grams(grams) if options.spectra else None

    return Work(
        run=run,
        answer=lambda found: _answer(task, *found),
        gives="Grams by tensor" + (", all spectra by layer and of the full matrix" if options.spectra else ""),
    )


def _answer(task: Task, grams: Any, result: Any) -> Answer:
    blocks: dict[str, Tensor] = {label: grams.block(names) for label, names in task.blocks.items()}
    spectra = None
    if result is not None:
        spectra = {label: spectrum.eigenvalues for label, spectrum in result.blocks.items()}
        spectra[FULL] = result.full.eigenvalues
    return Answer(grams={**blocks, FULL: grams.block()}, spectra=spectra)


def _has_pass_dtype() -> bool:
    return "pass_dtype" in inspect.signature(ff.token_grams).parameters
