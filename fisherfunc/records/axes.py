"""The axis glossary and the shared type aliases. Annotations and einops patterns use these letters.

| axis | meaning |
| --- | --- |
| n, m | units: rows of the gradient matrix (tokens, or sequences) |
| b | sequences of a batch |
| s, t | positions in a sequence |
| v | classes (the vocabulary), or outputs of a regression |
| p | parameters (entries) of a block |
| k | eigenpairs |
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Params = Mapping[str, Tensor]
Batch = Any
"""A mapping of keyword arguments, or a tuple `(*inputs, targets)`; sequences lie along dimension 0."""

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`, in backward passes of one token."""
