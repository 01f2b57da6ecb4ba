"""The oracle: one forward and one backward pass of the user's own module a token, float64 Grams. No fisherfunc import.

The rule for which tokens count, and their loss, are written out here a second time, as loops.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Term:
    """One token: where its prediction is read off the model's output, and its target."""

    sequence: int
    position: int
    target: Any


def terms(kind: str, batch: Any) -> list[Term]:
    """The valid tokens of a batch, in order."""
    if kind in ("classification", "regression"):
        targets = batch[-1] if isinstance(batch, tuple) else batch["labels"]
        return [Term(b, 0, targets[b]) for b in range(len(targets))]
    if kind == "causal_lm":
        return _causal(batch)
    mask_key = {"masked_lm": "attention_mask", "seq2seq_lm": "decoder_attention_mask"}[kind]
    found = []
    for b, row in enumerate(batch["labels"].tolist()):
        for s, target in enumerate(row):
            attended = mask_key not in batch or bool(batch[mask_key][b, s])
            if target != -100 and attended:
                found.append(Term(b, s, target))
    return found


def _causal(batch: dict[str, torch.Tensor]) -> list[Term]:
    targets = batch.get("labels", batch["input_ids"])
    mask = batch.get("attention_mask", torch.ones_like(targets))
    found = []
    for b in range(targets.shape[0]):
        for s in range(targets.shape[1] - 1):
            if mask[b, s] and mask[b, s + 1] and targets[b, s + 1] != -100:
                found.append(Term(b, s, int(targets[b, s + 1])))
    return found


def forward(model: torch.nn.Module, kind: str, batch: Any, b: int) -> torch.Tensor:
    """The predictions of sequence `b` alone."""
    if isinstance(batch, tuple):
        output = model(*(x[b : b + 1] for x in batch[:-1]))
    else:
        one = {k: v if v.shape[0] == 1 else v[b : b + 1] for k, v in batch.items()}
        if kind != "seq2seq_lm":
            one.pop("labels", None)
        output = model(**one)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return logits[0]


def token_loss(kind: str, predictions: torch.Tensor, term: Term) -> torch.Tensor:
    """−log p(target), or half the squared error."""
    if kind == "regression":
        return ((predictions.flatten() - term.target.flatten()) ** 2).sum() / 2
    row = predictions if predictions.ndim == 1 else predictions[term.position]
    return torch.logsumexp(row, dim=0) - row[int(term.target)]


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Its recurrent layers have no backward pass in evaluation mode."""
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def gradient_rows(model: torch.nn.Module, kind: str, batch: Any) -> dict[str, torch.Tensor]:
    """{name: (N, P)} in float64, by ordinary backward passes on the module itself, in evaluation mode."""
    model.eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = dict(model.named_parameters())
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for term in terms(kind, batch):
        with without_cudnn():
            loss = token_loss(kind, forward(model, kind, batch, term.sequence), term)
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            gradient = torch.zeros_like(parameters[name]) if gradient is None else gradient
            rows[name].append(gradient.flatten().double())
    return {name: torch.stack(r) for name, r in rows.items()}


def gram_errors(grams: dict[str, torch.Tensor], rows: dict[str, torch.Tensor], floor: float) -> dict[str, float]:
    """‖K − K*‖/‖K*‖ a parameter; one zero up to rounding (a key bias) is measured against `floor` · ‖K_full‖."""
    assert set(grams) == set(rows), set(grams) ^ set(rows)
    truth = {name: g @ g.T for name, g in rows.items()}
    everything = torch.linalg.matrix_norm(torch.stack(list(truth.values())).sum(0))
    return {
        name: float(
            torch.linalg.matrix_norm(grams[name].double() - k) / (torch.linalg.matrix_norm(k) + floor * everything)
        )
        for name, k in truth.items()
    }
