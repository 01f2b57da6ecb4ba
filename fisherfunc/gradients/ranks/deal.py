"""Which rank passes over which sequences: by cost, so that none has much more to do than its share.

A sequence of n rows and s numbers costs n s: as many backward passes, each over what it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

import torch
from torch import Tensor

from fisherfunc.gradients.rows.gradient_rows import runs
from fisherfunc.gradients.rows.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Deal:
    """The rows of each rank.

    Attributes:
        rows: Those of each, in ascending order; of whole sequences. Rank 0 has the costliest sequence.
        halves: How many of them make up about half of the rank's work: the first ones, of whole sequences.
        share: The part of all work that the rank with most of it has.
    """

    rows: tuple[Tensor, ...]
    halves: tuple[int, ...]
    share: float

    @property
    def counts(self) -> tuple[int, ...]:
        """How many rows each rank has."""
        return tuple(map(len, self.rows))

    def columns(self, rank: int) -> slice:
        """The columns of a rank's rows, where these lie rank after rank."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])


def dealt(work: Workload, size: int) -> Deal:
    """Deal the sequences of a workload to so many ranks, the costliest first, each to the one that has least."""
    tokens = work.tokens.sequence
    bounds = list(runs(tokens))
    firsts = tokens[torch.tensor([start for start, _ in bounds], device=tokens.device)].tolist()
    costs = [
        (stop - start) * work.sequences.num_entries(number)
        for (start, stop), number in zip(bounds, firsts, strict=True)
    ]
    loads = [(0, rank) for rank in range(size)]
    heapify(loads)
    shares: list[list[int]] = [[] for _ in range(size)]
    for place in sorted(range(len(bounds)), key=lambda place: (-costs[place], place)):
        load, rank = loads[0]
        shares[rank].append(place)
        heapreplace(loads, (load + costs[place], rank))
    found = [_rows(sorted(share), bounds, tokens.device) for share in shares]
    return Deal(
        rows=tuple(found),
        halves=tuple(_half(sorted(share), bounds, costs) for share in shares),
        share=max(load for load, _ in loads) / max(sum(costs), 1),
    )


def _rows(share: Sequence[int], bounds: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    if not share:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat([torch.arange(*bounds[place], device=device) for place in share])


def _half(share: Sequence[int], bounds: Sequence[tuple[int, int]], costs: Sequence[int]) -> int:
    """The rows before the sequence that is past half of the cost."""
    half, before, rows = sum(costs[place] for place in share) / 2, 0.0, 0
    for place in share:
        if before + costs[place] / 2 > half:
            break
        before += costs[place]
        rows += bounds[place][1] - bounds[place][0]
    return rows
