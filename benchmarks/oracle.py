"""The oracle, and the check that comes before a time counts.

The oracle is a plain loop: the model in float64, one backward pass a row, Grams in float64, `eigvalsh`. Where all rows
are too much, it takes some of them: the Gram of these is a principal submatrix, whose eigenvalues are compared. A
contender passes if every eigenvalue λ that it gives differs from the oracle's λ* by at most
`tolerance` · λ* + `tolerance`/100 · λ*_max.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.contenders.common import Answer, by_block, gram_in_float64
from benchmarks.contenders.loop import gradients_of
from benchmarks.tasks import Task

TOLERANCE = 1e-3
LEADING = 10
_FLOAT64_ROWS = 3 * 10**9  # bytes; above it rows are kept in float32, which rounds each entry by 6e-8 of itself


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The truth about some rows of a task.

    Attributes:
        rows: Which.
        num_rows: Out of how many.
        grams: Block → unnormalised Gram of these rows, float64.
    """

    rows: tuple[int, ...]
    num_rows: int
    grams: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an answer compares.

    Attributes:
        error: The largest |λ − λ*|/λ*_max over blocks and eigenvalues.
        reason: Why it is rejected; None where it passes.
        compared: What was compared, in words.
    """

    error: float
    reason: str | None
    compared: str


def sampled_rows(num_rows: int, rows_a_sequence: int, count: int | None) -> tuple[int, ...]:
    """All rows, or some: half of them from the first sequence, the others from all over.

    Example:
        >>> sampled_rows(12, 4, 4)
        (0, 3, 11)
    """
    if count is None or count >= num_rows:
        return tuple(range(num_rows))
    near = torch.linspace(0, rows_a_sequence - 1, min(count // 2, rows_a_sequence)).long().tolist()
    far = torch.linspace(0, num_rows - 1, count - count // 2).long().tolist()
    return tuple(sorted({*near, *far}))


def oracle(task: Task, count: int | None) -> Oracle:
    """The loop in float64.

    Args:
        task: The task; its model is copied.
        count: Of how many rows; of all where None.
    """
    inputs = task.inputs.double() if task.inputs.is_floating_point() else task.inputs
    exact = replace(task, model=copy.deepcopy(task.model).double(), inputs=inputs)
    named = dict(exact.model.named_parameters())
    rows = sampled_rows(task.num_rows, task.rows_a_sequence, count)
    dtype = torch.float64 if 8 * len(rows) * task.num_params <= _FLOAT64_ROWS else torch.float32
    held = {name: p.new_empty(len(rows), p.numel(), dtype=dtype, requires_grad=False) for name, p in named.items()}
    for place, gradients in enumerate(gradients_of(exact, rows, list(named.values()))):
        for own, gradient in zip(held.values(), gradients, strict=True):
            own[place] = gradient.flatten()
    grams = {name: gram_in_float64(own).cpu() for name, own in held.items()}
    return Oracle(rows=rows, num_rows=task.num_rows, grams=by_block(grams, task.blocks))


def check(answer: Answer, truth: Oracle, *, tolerance: float = TOLERANCE) -> Verdict:
    """Compare whatever an answer gives with the oracle.

    Args:
        answer: Grams, spectra or both.
        truth: The oracle of the same task.
        tolerance: Relative; a hundredth of it is relative to the largest eigenvalue.
    """
    found: list[tuple[float, str | None]] = []
    compared = []
    whole = len(truth.rows) == truth.num_rows
    if answer.grams is not None:
        rows = answer.rows if answer.rows is not None else range(truth.num_rows)
        common = sorted({*rows} & {*truth.rows})
        theirs, true = _places(rows, common), _places(truth.rows, common)
        for label, gram in answer.grams.items():
            want = _eigenvalues(truth.grams[label][true][:, true])
            found.append(_compare(label, _eigenvalues(gram[theirs][:, theirs].double()), want, tolerance))
        compared.append(f"all {len(common)} eigenvalues" if whole else f"{len(common)} rows")
    if answer.spectra is not None and (whole or answer.grams is not None):
        for label, values in answer.spectra.items():
            gram = truth.grams[label] if whole else (answer.grams or {})[label].double()
            want = _eigenvalues(gram) / truth.num_rows
            found.append(_compare(label, values, want[: len(values)], tolerance))
        fewest = min(len(values) for values in answer.spectra.values())
        compared = (
            [f"all {fewest} eigenvalues" if fewest == truth.num_rows else f"{fewest} leading"] if whole else compared
        )
    if not found:
        return Verdict(error=float("nan"), reason="nothing that the oracle can be compared with", compared="nothing")
    return Verdict(
        error=max(error for error, _ in found),
        reason=next((reason for _, reason in found if reason), None),
        compared=", ".join(compared),
    )


def summary(answer: Answer) -> dict[str, dict[str, list[float] | float]]:
    """The leading eigenvalues and the trace of each block of an answer with spectra."""
    return {
        label: {"leading": values[:LEADING].tolist(), "trace": float(values.sum())}
        for label, values in (answer.spectra or {}).items()
    }


def _compare(label: str, got: Tensor, want: Tensor, tolerance: float) -> tuple[float, str | None]:
    if got.shape != want.shape:
        return float("inf"), f"{label}: {len(got)} eigenvalues where the oracle has {len(want)}"
    gap, largest = (got - want).abs(), want[0].clamp_min(torch.finfo(want.dtype).tiny)
    error = float((gap / largest).nan_to_num(float("inf")).max())
    wrong = ~(gap <= tolerance * want.abs() + tolerance / 100 * largest)
    if not bool(wrong.any()):
        return error, None
    first = int(wrong.nonzero()[0])
    return error, f"{label}: eigenvalue {first + 1} is {float(got[first]):.4g}, the oracle's {float(want[first]):.4g}"


def _eigenvalues(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)


def _places(rows: Sequence[int], common: list[int]) -> list[int]:
    at = {row: place for place, row in enumerate(rows)}
    return [at[row] for row in common]
