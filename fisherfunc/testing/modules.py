"""Tiny modules: a causal transformer of one layer and a perceptron. Ids are `(b, s)`, logits `(b, s, v)`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class TinyOutput(NamedTuple):
    """What `TinyForCausalLM` may return."""

    logits: Tensor


class TinyForCausalLM(nn.Module):
    """Embedding, one causal self-attention, norm, output layer, perhaps tied; the logits are `(b, s, v)`."""

    def __init__(self, vocabulary: int, width: int, max_length: int, tied: bool, named: bool) -> None:
        super().__init__()
        self.made_with = (vocabulary, width, max_length, tied, named)
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(max_length, width)
        self.query = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=not tied)
        self.named = named
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | TinyOutput:
        """The logits; those at padding mean nothing."""
        length = input_ids.shape[1]
        hidden = self.embed(input_ids) + self.positions(torch.arange(length, device=input_ids.device))
        visible = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, :].bool()
        scores = self.query(hidden) @ hidden.mT
        mixed = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ hidden
        logits = self.lm_head(self.norm(hidden + mixed))
        return TinyOutput(logits) if self.named else logits


class TinyPerceptron(nn.Module):
    """Linear, `repeats` times the same Linear, Linear, with tanh between."""

    def __init__(self, num_inputs: int, width: int, num_outputs: int, repeats: int, bias: bool) -> None:
        super().__init__()
        self.made_with = (num_inputs, width, num_outputs, repeats, bias)
        self.first = nn.Linear(num_inputs, width, bias=bias)
        self.shared = nn.Linear(width, width, bias=bias)
        self.head = nn.Linear(width, num_outputs, bias=bias)
        self.repeats = repeats

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs `(b, v)`."""
        hidden = self.first(inputs).tanh()
        for _ in range(self.repeats):
            hidden = self.shared(hidden).tanh()
        return self.head(hidden)


def with_weights(kind: str, made_with: tuple[Any, ...], weights: dict[str, Tensor]) -> nn.Module:
    """Build a tiny module with these weights, in their dtype and evaluation mode: what a counterexample is pasted with.

    Args:
        kind: "TinyForCausalLM" or "TinyPerceptron".
        made_with: The arguments of its class.
        weights: As `state_dict` has them.
    """
    module = {"TinyForCausalLM": TinyForCausalLM, "TinyPerceptron": TinyPerceptron}[kind](*made_with)
    module.to(next(iter(weights.values())).dtype).load_state_dict(weights)
    return module.eval()
