"""What a pass works on, and how: the two bundles that every route takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.autodiff.nature import Nature
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.linalg.grams.token_grams import Tokens
from fisherfunc.records.axes import Batch, Params, Progress
from fisherfunc.runtime.memory import free_bytes


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows and columns of the gradient matrix.

    Attributes:
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        sequences: One-sequence batches.
        loss: The token loss.
        tokens: The tokens wanted, in the order of sequence and position; each as often as it has targets.
        nature: What was seen of the model's arithmetic.
    """

    fn: ModelFunction
    params: Params
    sequences: Sequences
    loss: TokenLoss
    tokens: Tokens
    nature: Nature

    def select(self, index: Tensor) -> "Workload":
        """The same with the tokens of `index` alone."""
        return replace(self, tokens=self.tokens.select(index.to(self.tokens.sequence.device)))

    @property
    def num_tokens(self) -> int:
        """N, the number of rows; N T where a token has T targets."""
        return len(self.tokens.sequence)

    @property
    def num_params(self) -> dict[str, int]:
        """{name: P_p}."""
        return {name: p.numel() for name, p in self.params.items()}

    @property
    def longest(self) -> Batch:
        """The sequence with the most tokens; of several, the one of the largest tensors."""
        counts = torch.bincount(self.tokens.sequence)
        most = (counts == counts.max()).nonzero().squeeze(-1).tolist()
        return self.sequences[max(most, key=self.sequences.num_entries)]

    @property
    def largest(self) -> Batch:
        """Of the sequences that have a token, the one of the largest tensors."""
        return self.sequences[max(self.tokens.sequence.unique().tolist(), key=self.sequences.num_entries)]


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """How to pass.

    Attributes:
        chunk_size: Tokens a batched backward pass; chosen by the route where None.
        memory_limit: In bytes, beyond the model; half of what is free where None.
        gram_dtype: What Grams are accumulated in.
        labels: {parameter: the label that its Gram is added under}; each has a Gram of its own where None.
        checked: Whether the Grams will be held against ordinary backward passes (certificate.py).
        plan: That of a route, made for another batch of the same shapes; the route plans where None.
        tried: Whether a long pass is tried on a few tokens before it begins.
        refused: {exploit, or parameter that is not to be factored: why}; what a check has failed for.
        progress: Called with the token passes done and their total.
    """

    chunk_size: int | None = None
    memory_limit: int | None = None
    gram_dtype: torch.dtype = torch.float64
    labels: Mapping[str, str] | None = None
    checked: bool = True
    plan: Any = None
    tried: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    progress: Progress | None = None

    def label(self, name: str) -> str:
        """What the Gram of a parameter is added under."""
        return name if self.labels is None else self.labels[name]

    def limit(self, device: torch.device) -> int:
        """The memory limit in bytes."""
        return free_bytes(device) // 2 if self.memory_limit is None else self.memory_limit
