"""What several test files build: Grams of gradients at hand, without a model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherfunc.linalg.gram import gram_of
from fisherfunc.linalg.grams.token_grams import TokenGrams, Tokens
from fisherfunc.records.provenance import Provenance


def matrices(tree: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of any shape as matrices `(n, p)`."""
    return {name: g.reshape(g.shape[0], -1) for name, g in tree.items()}


def grams_of(tree: Mapping[str, Tensor], *, sequence: Tensor | None = None) -> TokenGrams:
    """The float64 Grams of gradients; one sequence a token where `sequence` is None."""
    rows = matrices(tree)
    num_rows = len(next(iter(rows.values())))
    return TokenGrams(
        grams={name: gram_of(g, dtype=torch.float64) for name, g in rows.items()},
        tokens=Tokens(
            sequence=torch.arange(num_rows) if sequence is None else sequence,
            position=torch.arange(num_rows) % 3,
            loss=torch.linspace(0.5, 2.0, num_rows),
        ),
        scale={},
        num_params={name: g.shape[1] for name, g in rows.items()},
        unit="token",
        centered=False,
        precision=next(iter(rows.values())).dtype,
        provenance=Provenance(loss="causal_lm", seed=0),
    )


def total_square(tree: Mapping[str, Tensor]) -> float:
    """Σ‖g‖² over all rows and parameters: the scale of round-off in anything made from the Grams."""
    return sum(float(g.double().square().sum()) for g in tree.values())
