"""Losses on held-out text, in nats per token, and the baseline that a trained model must beat.

    loss = -1/N Σ_t log p(y_t | y_<t in its window)

over windows of one context each that overlap by one token, so that every token but the stream's
first (and a remainder shorter than a context) is predicted once. Axis order: n windows, s positions.
"""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy, nll_loss
from transformers import AutoModelForCausalLM, PreTrainedModel

_BATCH = 64


def held_out_windows(tokens: Int[Tensor, " t"], *, context: int) -> Int[Tensor, "n s"]:
    """Consecutive windows of `context + 1` tokens: `context` inputs, and a target for each."""
    return tokens.unfold(0, context + 1, context)


def next_token_loss(model: PreTrainedModel, windows: Int[Tensor, "n s"]) -> Tensor:
    """Mean loss of the windows' tokens after their first, differentiable in the model."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def model_loss(model: PreTrainedModel, windows: Int[Tensor, "n s"]) -> float:
    """Mean loss over all windows, a batch at a time."""
    parts = [next_token_loss(model, part).item() * len(part) for part in windows.split(_BATCH)]
    return sum(parts) / len(windows)


def checkpoint_loss(folder: Path, windows: Int[Tensor, "n s"]) -> float:
    """Mean loss of the weights as stored in `folder`, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model_loss(model.eval(), windows)


def unigram_loss(train: Int[Tensor, " t"], windows: Int[Tensor, "n s"], *, vocab_size: int) -> float:
    """Mean loss on the same targets of token frequencies, add-one smoothed, in `train`."""
    counts = torch.bincount(train, minlength=vocab_size).double() + 1
    targets = windows[:, 1:].flatten()
    return nll_loss((counts / counts.sum()).log().expand(len(targets), -1), targets).item()
