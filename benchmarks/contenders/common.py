"""What contenders share: what one hands back, and Grams and spectra from rows as a competent user would write them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.tasks import Task

FULL = "full matrix"
_TILE = 2**16


class CannotError(Exception):
    """A contender cannot do the job; the message is the reason that the table gives."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a contender is to run.

    Attributes:
        spectra: Whether the spectra of all layers are part of the job.
        rows: Only the gradients of these rows, all of one sequence, and nothing made of them; the forward pass, which
            the sequence's other rows would share, is not timed. All rows and their Grams where None.
        dtype: Of the pass.
        memory_limit: In bytes.
        blocks: What Grams are accumulated by: "tensor", "layer", or "whole" for that of the full matrix alone.
    """

    spectra: bool = False
    rows: tuple[int, ...] | None = None
    dtype: str = "float32"
    memory_limit: int | None = None
    blocks: str = "tensor"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is checked against the oracle.

    Attributes:
        grams: Block → unnormalised Gram, of all rows or of `rows`.
        spectra: Block → eigenvalues of F, largest first: all of them, or the leading ones.
        rows: The rows that the Grams are of; all where None.
    """

    grams: Mapping[str, Tensor] | None = None
    spectra: Mapping[str, Tensor] | None = None
    rows: tuple[int, ...] | None = None


def on_cpu(answer: Answer) -> Answer:
    """The answer where the oracle is."""
    grams, spectra = (
        None if found is None else {label: tensor.cpu() for label, tensor in found.items()}
        for found in (answer.grams, answer.spectra)
    )
    return replace(answer, grams=grams, spectra=spectra)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A contender that is ready to run.

    Attributes:
        run: What is timed.
        answer: What `run` returned → what is checked; not timed.
        gives: What the user gets, in words.
        before: What is done before each repetition, and not timed.
        warm: What is done once, first of all; `run` on a few rows of the task where None.
    """

    run: Callable[[], Any]
    answer: Callable[[Any], Answer]
    gives: str
    before: Callable[[], Any] | None = None
    warm: Callable[[], Any] | None = None


Contender = Callable[[Task, Options], Work]


def work_of_rows(task: Task, options: Options, rows: Callable[[], dict[str, Tensor]]) -> Work:
    """The work of a contender that forms all gradients.

    Args:
        task: The task.
        options: How to run.
        rows: Forms the rows, `{name: (N, p)}`.
    """

    def run() -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        grams = {name: (g @ g.mT).double() for name, g in rows().items()}
        blocks = by_block(grams, task.blocks)
        return blocks, spectra_of(blocks) if options.spectra else None

    return Work(
        run=run,
        answer=lambda found: Answer(grams=found[0], spectra=found[1]),
        gives="Grams and spectra by layer" if options.spectra else "Grams by layer",
    )


def work_of_some_rows(
    task: Task,
    rows: Sequence[int],
    forward: Callable[[int], Any],
    backward: Callable[[Any, list[int]], list[list[Tensor]]],
) -> Work:
    """The work of a contender that forms some gradients of one sequence, and keeps them as they come.

    Args:
        task: The task.
        rows: Which.
        forward: The sequence → what its backward passes start from.
        backward: From there, and the places in the sequence, to a gradient a parameter for each.
    """
    size, start = task.rows_a_sequence, []
    sequences = {row // size for row in rows}
    if len(sequences) != 1:
        raise CannotError(f"gradients alone are those of one sequence; rows {tuple(rows)} are of {len(sequences)}")

    def before() -> None:
        start[:] = [forward(*sequences)]

    def answer(found: list[list[Tensor]]) -> Answer:
        names = [name for name, _ in task.model.named_parameters()]
        columns = zip(names, zip(*found, strict=True), strict=True)
        grams = {name: gram_in_float64(torch.stack([g.flatten() for g in own])) for name, own in columns}
        return Answer(grams=by_block(grams, task.blocks), rows=tuple(rows))

    return Work(
        run=lambda: backward(start[0], [row % size for row in rows]),
        answer=answer,
        gives="gradients alone",
        before=before,
    )


def by_block(grams: Mapping[str, Tensor], blocks: Mapping[str, Iterable[str]]) -> dict[str, Tensor]:
    """Grams add: those of the blocks and of the full matrix."""
    found = {label: torch.stack([grams[name] for name in names]).sum(dim=0) for label, names in blocks.items()}
    return {**found, FULL: torch.stack(list(found.values())).sum(dim=0)}


def spectra_of(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All eigenvalues of K/N, largest first."""
    return {label: torch.linalg.eigvalsh(gram).flip(-1) / len(gram) for label, gram in blocks.items()}


def gram_in_float64(rows: Tensor) -> Tensor:
    """K = G Gᵀ in float64, tile by tile of columns."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for tile in rows.split(_TILE, dim=1):
        wide = tile.double()
        gram.addmm_(wide, wide.mT)
    return gram
