"""Parts that are wrong on purpose, each with the law that kills it: so that a suite is seen to find what it is for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.losses.token_losses import causal_lm
from fisherfunc.linalg.gram import Gram
from fisherfunc.linalg.kernels import gram_eigh
from fisherfunc.linalg.metrics import trace
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.testing.gradient_laws import (
    check_loss,
    check_partition,
    check_representation,
    loop_of_backward_passes,
    token_outputs,
)
from fisherfunc.testing.law import Report
from fisherfunc.testing.models import TinyModel
from fisherfunc.testing.spectral_laws import check_kernel, check_metric, check_operator


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A part that is wrong.

    Attributes:
        name: The id of a test.
        fault: What is wrong.
        applies_to: The kind of part, as of the law.
        killed_by: The law that it breaks.
        part: The part.
        examples: Of a loss, if other than the usual ones.
    """

    name: str
    fault: str
    applies_to: str
    killed_by: str
    part: Any
    examples: Any = None

    def report(self) -> Report:
        """Try the laws of its kind on it."""
        if self.applies_to == "loss":
            return check_loss(self.part, examples=self.examples)
        return _CHECKS[self.applies_to](self.part)

    def __str__(self) -> str:
        """Name it, as the id of a test."""
        return self.name


def _kernel(change: Callable[[Tensor, Spectrum], Tensor]) -> Callable[..., Spectrum]:
    """`gram_eigh` with other eigenvalues."""
    right = gram_eigh()

    def kernel(gram: Gram) -> Spectrum:
        found = right(gram)
        return replace(found, eigenvalues=change(found.eigenvalues, found))

    return kernel


def _first_row(gram: Gram) -> Spectrum:
    found, matrix = gram_eigh()(gram), gram.matrix
    share = matrix[0, 0] / matrix.trace().clamp(min=1e-300)
    return replace(found, eigenvalues=found.eigenvalues * (1 + 1e-6 * share))


def _by_value(gram: Gram) -> Spectrum:
    """Decide by a value, which `vmap` has none of."""
    found = gram_eigh()(gram)
    return found if bool(gram.matrix.trace() > 0) else replace(found, eigenvalues=0 * found.eigenvalues)


def _noisy() -> Callable[..., Spectrum]:
    calls = count()
    return _kernel(lambda values, _: values * (1 + 1e-15 * (next(calls) % 7)))


def _by_rows(gram: Gram) -> Spectrum:
    return gram_eigh()(replace(gram, num_units=len(gram.matrix)))


def _numbered() -> Callable[[str], str]:
    calls = count()
    return lambda name: f"block.{next(calls)}"


def _rolled(output: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(output, batch[-1], reduction="none").roll(1)


def _averaged(output: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(output, batch[-1], reduction="none") / len(output)


def _detached(output: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(output.detach(), batch[-1], reduction="none")


def _unmasked(output: Tensor, batch: Any) -> Tensor:
    if isinstance(batch, tuple):
        return torch.nn.functional.cross_entropy(output, batch[-1], reduction="none")
    logits, ids = output[:, :-1].mT, batch["input_ids"][:, 1:]
    return torch.nn.functional.cross_entropy(logits, ids, reduction="none")


def _mean_for_sum(model: TinyModel) -> dict[str, Tensor]:
    rows = loop_of_backward_passes(model)
    return {name: entry / len(entry) for name, entry in rows.items()}


def _next_row(model: TinyModel) -> dict[str, Tensor]:
    return {name: entry.roll(1, dims=0) for name, entry in loop_of_backward_passes(model).items()}


def _tied_twice(model: TinyModel) -> dict[str, Tensor]:
    names = [name for name, _ in model.module.named_parameters(remove_duplicate=False)]
    tied = len(names) - len(list(model.module.named_parameters()))
    rows = loop_of_backward_passes(model)
    return {name: 2 * entry if tied and name == "embed.weight" else entry for name, entry in rows.items()}


def _mask_ignored(model: TinyModel) -> dict[str, Tensor]:
    if isinstance(model.batch, tuple):
        return loop_of_backward_passes(model)
    batch = {key: entry for key, entry in model.batch.items() if key != "attention_mask"}
    return loop_of_backward_passes(model._replace(batch=batch))


def _label_not_shifted(model: TinyModel) -> dict[str, Tensor]:
    if isinstance(model.batch, tuple):
        return loop_of_backward_passes(model)
    right = causal_lm()
    wrong = replace(right, predictions=lambda output, batch: right.predictions(output, batch).roll(1, dims=1))

    def losses(output: Any, batch: Any) -> Tensor:
        return wrong.values(output, batch)

    rows = loop_of_backward_passes(model._replace(loss=losses))
    kept = torch.as_tensor(right.valid(model.batch)).flatten()
    return {name: entry[kept] for name, entry in rows.items()}


def _uneven(vector: Tensor) -> Tensor:
    return vector.cumsum(dim=0)


_CHECKS: dict[str, Callable[..., Report]] = {
    "kernel": check_kernel,
    "metric": check_metric,
    "rows": check_representation,
    "rule": check_partition,
    "operator": partial(check_operator, size=4),
}

mutants = tuple(
    Mutant(
        name=name, fault=fault, applies_to=applies_to, killed_by=killed_by, part=part, examples=next(iter(rest), None)
    )
    for applies_to, name, fault, killed_by, part, *rest in (
        ("kernel", "N-dropped", "not divided by N", "known", _kernel(lambda v, s: v * s.num_units)),
        ("kernel", "N-of-rows", "divided by the number of rows, not of units", "normalisation", _by_rows),
        ("kernel", "ascending", "smallest first", "ordered", _kernel(lambda v, _: v.flip(-1))),
        ("kernel", "to-one", "divided by their sum", "scale", _kernel(lambda v, _: v / v.sum().clamp(min=1e-300))),
        ("kernel", "last-lost", "the smallest set to zero", "trace", _kernel(lambda v, _: v * (v > v.min()))),
        ("kernel", "first-row", "weighted by the first row", "permutation", _first_row),
        ("kernel", "by-value", "an `if` on a value, which vmap cannot follow", "mapped", _by_value),
        ("kernel", "noisy", "another last bit at each call", "repeatable", _noisy()),
        ("metric", "mean", "a mean for a sum", "zeros", lambda s: s.eigenvalues.mean(dim=-1)),
        ("metric", "N-again", "divided by N once more", "facts", lambda s: trace(s) / s.num_units),
        ("metric", "damped", "with a damping of 1", "homogeneous", lambda s: (1 + s.eigenvalues).log().sum(dim=-1)),
        ("metric", "over-all", "over a whole stack", "stacked", lambda s: s.eigenvalues.max()),
        ("loss", "mean", "a mean over the batch", "alone", _averaged),
        ("loss", "next", "shifted by one sample", "order", _rolled),
        ("loss", "detached", "cut off from the output", "differentiable", _detached),
        ("loss", "mask-ignored", "padding counted", "masked", _unmasked, token_outputs()),
        ("rows", "mean", "a mean for a sum", "sum", _mean_for_sum),
        ("rows", "next", "shifted by one token", "loop", _next_row),
        ("rows", "tied-twice", "a tied weight counted twice", "sum", _tied_twice),
        ("rows", "mask-ignored", "padding attended to", "loop", _mask_ignored),
        ("rows", "not-shifted", "targets one position late", "loop", _label_not_shifted),
        ("rule", "numbered", "a new block at each call", "repeatable", _numbered()),
        ("rule", "no-label", "an empty label", "labelled", lambda name: name.partition(".")[2]),
        ("operator", "one-sided", "not symmetric", "symmetric", _uneven),
        ("operator", "negative", "of another sign", "positive", lambda vector: -vector),
        ("operator", "affine", "with a constant", "linear", lambda vector: vector + 1),
    )
)
"""Each is killed by the law that it names, and every law kills at least one."""
