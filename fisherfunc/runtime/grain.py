"""How large the pieces of work had better be: on a CPU they fit its cache, on a GPU they outweigh their launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Grain:
    """Sizes that suit a kind of device; results do not depend on them beyond round-off.

    Attributes:
        features: The most features of a block of a contraction.
        middle_bytes: What the middle product of several strips may take.
        segment: Places of a row that are multiplied together: rows that end inside one are zero to its end.
        slots: The most of a batched backward pass.
        slot_share: The part of a causal sequence's slots that are passed together rather than sequences side by side.
        places: That such a pass should have, of all slots and sequences, for large matrix products.
        places_of_samples: The same where sequences have one slot: then what a stack costs by itself counts too.
        rows: Of a tile of a symmetric product.
        call: Operations that the overhead of one small product is worth.
        allocated: What an allocator takes for what comes and goes in a pass, against what is in use at a time.
        forward: What the forward pass of a prefix takes against the backward pass of a slot and its contraction.
        repeated: What each group adds to that: it goes forward to a boundary and backward from one, once more.
        little: Bytes of factors that are not worth a group of their own: what lies between the calls of modules is run
            again in each.
        by_id: Whether rows that are looked up are multiplied id by id, rather than pair by pair of sequences.
    """

    features: int
    middle_bytes: int
    segment: int
    slots: int
    slot_share: float
    places: int
    places_of_samples: int
    rows: int
    call: float
    allocated: float
    forward: float
    repeated: float
    little: int
    by_id: bool

    def num_blocks(self, width: int) -> int:
        """Into how many blocks so many features are cut: those of one weight, which meet block by block, alike."""
        return -(-width // self.features)


CPU = Grain(
    features=384,
    middle_bytes=2**25,  # a good part of the cache that cores share
    segment=8,
    slots=32,
    slot_share=0.25,
    places=1024,
    places_of_samples=16384,
    rows=384,
    call=4e6,
    allocated=1.75,
    forward=1.5,
    repeated=0.45,
    little=2**29,  # GPT-2 4 × 256, 252 tokens: 4.0 s in one group, 4.7 in three, 5.0 in six
    by_id=True,
)
GPU = Grain(
    features=1024,
    middle_bytes=2**28,
    segment=2**30,  # all of them
    slots=4096,
    slot_share=1.0,
    places=2**16,
    places_of_samples=2**18,
    rows=8192,
    call=5e8,
    allocated=1.25,
    forward=100.0,  # what a pass takes hardly grows with its slots
    repeated=30.0,
    little=2**33,
    by_id=False,
)


_chosen: list[Grain] = []


def grain_of(device: torch.device) -> Grain:
    """What suits a device, or what `divided_as` has chosen."""
    return _chosen[-1] if _chosen else CPU if device.type == "cpu" else GPU


@contextmanager
def divided_as(sizes: Grain) -> Iterator[None]:
    """Let whatever runs inside be divided by some sizes, whatever the device, in all threads of the process.

    Args:
        sizes: Of the pieces of work.

    Example:
        >>> with divided_as(GPU):
        ...     grain_of(torch.device("cpu")) is GPU
        True
    """
    _chosen.append(sizes)
    try:
        yield
    finally:
        _chosen.pop()
