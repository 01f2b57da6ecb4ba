"""Which tokens a matrix is of, to compare: the same for any order of rows, and any number of them a token."""

from jaxtyping import Int
from torch import Tensor, stack, unique

from fisherfunc.records.hashing import short_hash


def which_tokens(sequence: Int[Tensor, " n"], position: Int[Tensor, " n"], *, num_units: int) -> str:
    """A hash of the different (sequence, position), in their order, and of how often each is there.

    Args:
        sequence: Of each row.
        position: Of each row.
        num_units: N; a token that has several rows, for several targets, is there once.
    """
    found, counts = unique(stack([sequence, position]), dim=1, return_counts=True)
    return short_hash([found, counts * num_units // len(sequence)])
