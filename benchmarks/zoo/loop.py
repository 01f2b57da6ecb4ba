"""The loop that Grams are held to: for every sequence a fresh copy of the module and one forward pass of that sequence
alone; for every token one ordinary backward pass. Nothing of fisherfunc: which tokens count is written out once more.

An image is run beside a copy of itself: on a CPU torch 2.13 differentiates `batch_norm` wrongly for one sample alone
whose cotangent comes through `flatten(2).transpose(1, 2)` (EfficientFormer, LeViT), and rightly for two.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from benchmarks.zoo.case import Case

IGNORED = -100


@dataclass(frozen=True)
class Truth:
    """What the loop found.

    Attributes:
        gradients: {name: (N, P)} of what is trained.
        dtype: The coarsest dtype that what is differentiated passed through: many models cast to float32 inside.
    """

    gradients: Mapping[str, Tensor]
    dtype: torch.dtype

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(next(iter(self.gradients.values())))


def loop(case: Case) -> Truth:
    """One forward pass a sequence, one backward pass a token."""
    tokens = terms(case.loss, case.batch)
    trained = [name for name, p in case.model.named_parameters() if p.requires_grad and p.numel()]
    rows: dict[str, list[Tensor]] = {name: [] for name in trained}
    watch = _CoarsestDtype()
    for sequence in sorted({token[0] for token in tokens}):
        model = copy.deepcopy(case.model)
        named = {name: p for name, p in model.named_parameters() if name in rows}
        with watch:
            logits = _logits(model, case, sequence)
        own = [(position, target) for b, position, target in tokens if b == sequence]
        for position, target in own:
            scores = logits if case.loss == "classification" else logits[position]
            loss = torch.logsumexp(scores, dim=0) - scores[target]
            found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            for (name, parameter), gradient in zip(named.items(), found, strict=True):
                rows[name].append((torch.zeros_like(parameter) if gradient is None else gradient).flatten().double())
    return Truth(gradients={name: torch.stack(found) for name, found in rows.items()}, dtype=watch.dtype)


def terms(loss: str, batch: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(sequence, position, target) of every token that counts, in order."""
    labels = batch["labels"]
    if loss == "classification":
        return [(b, 0, int(label)) for b, label in enumerate(labels)]
    masked_by = {"causal_lm": "attention_mask", "masked_lm": "attention_mask", "seq2seq_lm": "decoder_attention_mask"}
    mask = batch.get(masked_by[loss], torch.ones_like(labels))
    ahead = 1 if loss == "causal_lm" else 0
    return [
        (b, s, int(labels[b, s + ahead]))
        for b in range(labels.shape[0])
        for s in range(labels.shape[1] - ahead)
        if mask[b, s] and mask[b, s + ahead] and labels[b, s + ahead] != IGNORED
    ]


def _logits(model: torch.nn.Module, case: Case, sequence: int) -> Tensor:
    rows = [sequence, sequence] if case.loss == "classification" else [sequence]
    one = {key: value[rows] for key, value in case.batch.items()}
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):  # whose decoder reads the labels
        one.pop("labels")
    output = model(**one)
    if isinstance(output, Tensor):
        return output[0]
    return (output.logits if hasattr(output, "logits") else output[0])[0]


class _CoarsestDtype(TorchFunctionMode):
    """Sees every result of torch that is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad:
                self.dtype = max(self.dtype, leaf.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return result
