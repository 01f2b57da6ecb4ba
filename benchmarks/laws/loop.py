"""The plain loop: for each token a fresh copy of the user's module, its sample alone, one backward pass. Float64.

It imports nothing of the package: which tokens count, and their losses, are written out here once more.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.laws.batches import Piece

ROUNDING, MEETING = 1e-9, 1e-6
"""Samples that run together differ by no more than the one, relatively, where they do not meet; by more than the other
where they do. Between them nothing is said."""
TINY = 1e-12
"""Losses and gradients that are no larger are zero."""


@dataclass(frozen=True)
class Term:
    """One token: the piece and the row of its sample, the number of that sample, where it is, and its target."""

    piece: Piece
    row: int
    sequence: int
    position: int
    target: Any


def terms(task: str, pieces: Sequence[Piece]) -> list[Term]:
    """The tokens that count, in order."""
    found: list[Term] = []
    before = 0
    for piece in pieces:
        for row in range(piece.count):
            found += [Term(piece, row, before + row, *one) for one in _of_sample(task, piece, row)]
        before += piece.count
    return found


def _of_sample(task: str, piece: Piece, row: int) -> Iterator[tuple[int, Any]]:
    if task in ("classification", "pooled", "regression"):
        yield 0, piece.targets[row]
        return
    targets = (piece.inputs["input_ids"] if piece.targets is None else piece.targets)[row].tolist()
    keep = [True] * len(targets) if piece.keep is None else piece.keep[row].tolist()
    ahead = int(task == "causal_lm")
    for s in range(len(targets) - ahead):
        if keep[s] and keep[s + ahead] and int(targets[s + ahead]) != -100:
            yield s, int(targets[s + ahead])


def token_loss(task: str, output: Any, row: int, term: Term) -> Tensor:
    """−log p(target), or half the squared error."""
    logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
    predictions = (logits[0] if isinstance(logits, tuple) else logits)[row]
    if task == "regression":
        return (predictions.flatten() - term.target.flatten()).square().sum() / 2
    predictions = predictions if predictions.ndim == 1 else predictions[term.position]
    return predictions.logsumexp(0) - predictions[int(term.target)]


class Loop:
    """Gradients of a module by ordinary means.

    Args:
        model: The module, which is only copied.
        task: Which losses.
        labels: Whether it takes them.
    """

    def __init__(self, model: nn.Module, task: str, *, labels: bool) -> None:
        self.model, self.task, self.labels = model, task, labels
        self.names = [name for name, p in model.named_parameters() if p.requires_grad and p.numel()]

    def row(self, term: Term) -> tuple[float, list[Tensor]]:
        """The loss of one token and its gradients."""
        fresh, output = self._run(term.piece, slice(term.row, term.row + 1))
        loss = token_loss(self.task, output, 0, term)
        return loss.item(), self._gradients(fresh, loss)

    def together(self, terms: Sequence[Term], weights: Tensor) -> tuple[list[float], list[Tensor]]:
        """The losses of tokens of one batch, which runs as a whole, and the gradients of their weighted sum."""
        fresh, output = self._run(terms[0].piece, slice(None))
        losses = torch.stack([token_loss(self.task, output, term.row, term) for term in terms])
        return losses.tolist(), self._gradients(fresh, weights @ losses)

    def _run(self, piece: Piece, rows: slice) -> tuple[nn.Module, Any]:
        fresh = copy.deepcopy(self.model)
        for part in fresh.modules():
            part.training = False
        for parameter in fresh.parameters():
            parameter.grad = None
        inputs = copy.deepcopy(piece.rows(rows))
        if self.labels and piece.targets is not None:
            inputs["labels"] = piece.targets[rows].clone()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            return fresh, fresh(**inputs)

    def _gradients(self, fresh: nn.Module, loss: Tensor) -> list[Tensor]:
        parameters = dict(fresh.named_parameters())
        wanted = [parameters[name] for name in self.names]
        if not loss.requires_grad:
            return [torch.zeros(p.numel(), dtype=torch.float64) for p in wanted]
        loss.backward()
        return [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in wanted]


@dataclass(frozen=True)
class Expected:
    """What the loop found.

    Attributes:
        terms: The tokens.
        rows: {name: (N, P)}, a row a token.
        meeting: How far losses or gradients of batches are from those alone; None where batches do not run.
    """

    terms: list[Term]
    rows: dict[str, Tensor]
    meeting: float | None


def expected(loop: Loop, pieces: Sequence[Piece], *, only: set[tuple[int, int]] | None = None) -> Expected:
    """The rows of tokens, and whether samples meet in them.

    Args:
        loop: The module.
        pieces: The batches.
        only: The (sequence, position) of those whose batches are asked, and that gradients meet in; all where None.
    """
    every = terms(loop.task, pieces)
    found = [loop.row(term) for term in every]
    rows = {name: torch.stack([gradients[i] for _, gradients in found]) for i, name in enumerate(loop.names)}
    return Expected(every, rows, _meeting(loop, pieces, every, found, rows, only))


def _meeting(
    loop: Loop,
    pieces: Sequence[Piece],
    every: list[Term],
    found: list[tuple[float, list[Tensor]]],
    rows: dict[str, Tensor],
    only: set[tuple[int, int]] | None,
) -> float | None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(every), generator=generator, dtype=torch.float64)  # what is alike does not cancel
    largest = 0.0
    for piece in pieces:
        here = [n for n, term in enumerate(every) if term.piece is piece]
        asked = [only is None or (every[n].sequence, every[n].position) in only for n in here]
        if not any(asked) or piece.count < 2:  # of a loader it may never have been pulled
            continue
        weights = drawn[here] * torch.tensor(asked)
        try:
            losses, gradients = loop.together([every[n] for n in here], weights)
        except Exception:  # the user's batch itself does not run, so nothing can be said of it
            return None
        alone = torch.tensor([found[n][0] for n in here], dtype=torch.float64)
        off = float((torch.tensor(losses, dtype=torch.float64) - alone).norm() / alone.norm().clamp(min=TINY))
        each = torch.cat([weights[:, None] * rows[name][here] for name in loop.names], dim=1)
        apart = float((torch.cat(gradients) - each.sum(0)).norm() / each.norm().clamp(min=TINY))
        largest = max(largest, off, apart)
    return largest
