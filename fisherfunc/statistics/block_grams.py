"""Which Grams make up each block of a partition, and which rows each sequence has, or each cluster of sequences.

All of this layer that counts tokens or sequences takes the counts from here. Axis order: rows `(n,)`, sequences `(s,)`.
"""

from collections import Counter
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.partitioning import by_layer, partition, rule_name
from fisherfunc.records.record import record

BlockRule = Callable[[str], str] | None
"""Parameter name → block label; None for the blocks that the Grams were accumulated by, or `by_layer`."""


@record(static=("num_sequences",))
class Sequences:
    """The independent draws of a pass: its sequences, or where its tokens have clusters, these in their place.

    Attributes:
        group: The draw of each row, from 0 to `num_sequences` − 1.
        sizes: How many of the N units that F divides by each has; they sum to N.
        num_sequences: How many there are.
    """

    group: Int[Tensor, " n"]
    sizes: Float[Tensor, " s"]
    num_sequences: int


def sequences_of(grams: TokenGrams) -> Sequences:
    """The rows of each sequence or cluster. A row counts N over the number of rows: one, where a unit has one row."""
    tokens = grams.tokens
    ids, group = torch.unique(tokens.sequence if tokens.cluster is None else tokens.cluster, return_inverse=True)
    rows = torch.bincount(group, minlength=len(ids)).double()
    return Sequences(group=group, sizes=rows * (grams.num_units / len(group)), num_sequences=len(ids))


def several_sequences(grams: TokenGrams, what: str, *, least: int = 2) -> Sequences:
    """The sequences, where there are enough.

    Args:
        grams: The Grams of a pass.
        what: What needs them, for the error.
        least: How many are enough.

    Raises:
        ValueError: If there are fewer.
    """
    found = sequences_of(grams)
    if found.num_sequences < least:
        raise ValueError(
            f"{what} needs at least {least} sequences, got {found.num_sequences}: the tokens of a sequence depend on "
            "each other, and only differences between sequences show how sure a number is; pass over more sequences"
        )
    return found


def gathered(grams: TokenGrams, blocks: BlockRule) -> dict[str, tuple[str, ...]]:
    """{block: the Grams that it is the sum of}; where `blocks` is None, one a Gram that was accumulated, or by layer.

    Raises:
        ValueError: If the blocks are finer than those that the Grams were accumulated by.
    """
    if grams.labels is None:
        return partition(grams.grams, blocks or by_layer)
    if blocks is None:
        return {label: (label,) for label in grams.grams}
    of = grams.labels
    found = {block: tuple(dict.fromkeys(of[n] for n in names)) for block, names in partition(of, blocks).items()}
    counts = Counter(label for labels in found.values() for label in labels)
    for label, count in counts.items():
        if count > 1:
            raise ValueError(
                f"the Gram of {label!r} is a sum over parameters of {count} blocks of {rule_name(blocks)}: "
                f"{[block for block, labels in found.items() if label in labels]}; pass again with these blocks in "
                "token_grams, or with blocks=None, which keeps a Gram a parameter"
            )
    return found


def num_params(grams: TokenGrams, names: tuple[str, ...]) -> int:
    """P of a block."""
    return sum(grams.num_params[name] for name in names)
