"""Which token each row of the gradient matrix is, and which of its targets.

A token has one row where its target is the observed one, and T rows, one after the other, where it has T targets:
draws, classes, or the outputs of a regression. Axis order: n rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.records.record import record

TOKEN_FIELDS = ("sequence", "position", "loss")
TARGET_FIELDS = ("target", "draw", "cluster")
"""Those that may be None."""


@record(static=("num_targets",))
class Tokens:
    """Which unit each row of G is.

    Attributes:
        sequence: The index of its sequence, counted over all batches.
        position: Where in the sequence the prediction was made; −1 for a whole sequence.
        loss: Its loss in nats, at the observed target (summed over the tokens of a sequence).
        target: The class, or the number of the output, or the values drawn `(n, v)`; None where there is no such.
        draw: Which of the targets of its token, from 0 to T − 1; None where targets are observed.
        cluster: The number of its cluster (the document of its sequence, say); None where sequences are independent.
        num_targets: T.
    """

    sequence: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    loss: Float[Tensor, " n"]
    target: Int[Tensor, " n"] | Float[Tensor, "n v"] | None = None
    draw: Int[Tensor, " n"] | None = None
    cluster: Int[Tensor, " n"] | None = None
    num_targets: int = 1

    @property
    def entry(self) -> Int[Tensor, " n"]:
        """Which of the losses of its sequence each row is, where a position has T: s · T + t."""
        return self.position if self.draw is None else self.position * self.num_targets + self.draw

    @property
    def columns(self) -> dict[str, Tensor]:
        """{name: what there is of each row}."""
        columns = {name: getattr(self, name) for name in TOKEN_FIELDS + TARGET_FIELDS}
        return {name: column for name, column in columns.items() if column is not None}

    def select(self, index: Int[Tensor, " m"]) -> "Tokens":
        """The rows of `index`, in its order."""
        return self.map(lambda column: column[index])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """Every column changed alike."""
        changed: dict[str, Any] = {name: change(column) for name, column in self.columns.items()}
        return replace(self, **changed)


def concatenated(parts: Sequence[Tokens]) -> Tokens:
    """The rows of all parts, one after the other; they have the same columns."""
    columns: dict[str, Any] = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    return replace(parts[0], **columns)


def check_whole(tokens: Tokens, index: Int[Tensor, " m"]) -> None:
    """Raise where some rows of a token are chosen and others not, or not as often.

    Raises:
        ValueError: If so; it names the token.
    """
    if tokens.draw is None or tokens.num_targets == 1:
        return
    units, unit = torch.unique(torch.stack([tokens.sequence, tokens.position]), dim=1, return_inverse=True)
    size = units.shape[1] * tokens.num_targets
    counts = torch.bincount((unit * tokens.num_targets + tokens.draw)[index], minlength=size)
    uneven = (counts.reshape(-1, tokens.num_targets).diff(dim=1) != 0).any(dim=1)
    if bool(uneven.any()):
        sequence, position = units[:, uneven][:, 0].tolist()
        where = f"sequence {sequence}" + (f", position {position}" if position >= 0 else "")
        raise ValueError(
            f"select expected all {tokens.num_targets} rows of {where} or none, as they are its true Fisher together; "
            "choose by a mask on .tokens.sequence and .tokens.position"
        )


def summed_tokens(tokens: Tokens) -> tuple[Tokens, Int[Tensor, " n"]]:
    """The rows of sequences, in the order of sequence and draw, and which of them each row of tokens is summed into."""
    draw = torch.zeros_like(tokens.sequence) if tokens.draw is None else tokens.draw
    kept, group = torch.unique(tokens.sequence * tokens.num_targets + draw, return_inverse=True)
    sequence = kept // tokens.num_targets
    cluster = None if tokens.cluster is None else torch.empty_like(kept).index_copy_(0, group, tokens.cluster)
    summed = replace(
        tokens,
        sequence=sequence,
        position=torch.full_like(sequence, -1),
        loss=tokens.loss.new_zeros(len(kept)).index_add(0, group, tokens.loss),
        target=None,
        draw=None if tokens.draw is None else kept % tokens.num_targets,
        cluster=cluster,
    )
    return summed, group
