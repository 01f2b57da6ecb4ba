"""Segments: parts of a model between the calls of its modules, each run alone from what the calls before it returned.

A segment is some outer calls (calls.py), from one to another. It is run alone, with all calls before it played back as
leaves of the graph, and the cotangents at the leaves go on to the segments below. They are kept by call: what goes
around a block, as the states of an encoder do, is one more tensor with a cotangent. Segments are numbered from the
losses down; segment k ends with the call `ends[k − 1]`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.capture.calls import OuterCall, Outline
from fisherfunc.gradients.capture.recording import Recording, Use

Key = tuple[str, int]
"""A parameter and which use of it."""

Edge = tuple[Any, int]
"""A node of the autograd graph, and which of its outputs: a function that returns several tensors is one node."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Bytes held of a parameter of the output layer that is looked up by ids below.

    Attributes:
        between: After segment 0, when its own Gram was made: what the lookups need of it.
        below: That, and the factors of the lookups.
    """

    between: int
    below: int


@dataclass(frozen=True, kw_only=True)
class Segments:
    """How a model is divided.

    Attributes:
        outline: Its outer calls.
        ends: The rank of the call that each segment but the first ends with, in descending order.
        of: The segment of each use; all are in segment 0 where there is one.
        leaves: {parameter that is a leaf of the graph: the segments that reach it}.
        boundaries: Bytes of the cotangents of one token at each boundary.
        value_bytes: Of all that the outer calls of one sequence return.
        made: {segment: the share of the graph that is made in it}.
        carried: {parameter of the output layer that is looked up by ids below: what is held of it after segment 0}.
    """

    outline: Outline = field(default_factory=Outline)
    ends: tuple[int, ...] = ()
    of: Mapping[Key, int] = field(default_factory=dict)
    leaves: Mapping[str, frozenset[int]] = field(default_factory=dict)
    boundaries: tuple[int, ...] = ()
    value_bytes: int = 0
    made: Mapping[int, float] = field(default_factory=dict)
    carried: Mapping[str, Carried] = field(default_factory=dict)

    def end(self, segment: int) -> int | None:
        """The rank of the call that a segment ends with; None where that is the losses."""
        return self.ends[segment - 1] if segment else None

    def floor(self, segment: int) -> int:
        """The rank of the call below a segment; −1 where there is none."""
        return self.ends[segment] if segment < len(self.ends) else -1

    @property
    def boundary_bytes(self) -> int:
        """Of the cotangents of one token at a boundary, at most."""
        return max(self.boundaries, default=0)

    def at_narrow(self) -> "Segments":
        """The same model divided where the least goes from one segment to the next."""
        most = NARROW * min(self.boundaries, default=0)
        kept = [k for k, size in enumerate(self.boundaries) if size <= most]
        now = [sum(k < segment for k in kept) for segment in range(len(self.ends) + 1)]
        made: dict[int, float] = defaultdict(float)
        for segment, part in self.made.items():
            made[now[segment]] += part
        return replace(
            self,
            ends=tuple(self.ends[k] for k in kept),
            of={use: now[segment] for use, segment in self.of.items()},
            leaves={name: frozenset(now[k] for k in where) for name, where in self.leaves.items()},
            boundaries=tuple(self.boundaries[k] for k in kept),
            made=made,
        )


WHOLE = Segments()

NARROW = 1.5
"""Boundaries with more than so many times the bytes of the smallest are not narrow: those inside of a block."""


def segments_of(
    end: Tensor, recording: Recording, outline: Outline, *, before: int, leaves: Mapping[str, Tensor]
) -> Segments:
    """Divide a model between its outer calls, wherever the graph below `end` allows it.

    Where one runs past all values that would be played back to a use below, there is no boundary. Cost: one walk.

    Args:
        end: Where the cotangents start.
        recording: Of the pass, with its calls noted.
        outline: The outer calls.
        before: A boundary has at most so many uses below it: that of the output layer is above.
        leaves: Of the graph.
    """
    walk = _Walk(end, recording, outline, leaves)
    ends: list[OuterCall] = []
    sizes: list[int] = []
    for outer in reversed(outline.playable):
        until = outer.call.uses_until
        if until > before or not any(use < until for use in walk.left):
            continue
        if ends and until == ends[-1].call.uses_until:  # nothing is used in between
            continue
        walk.down_to(outer.rank)
        if walk.pending and all(use >= until for use in walk.reached):
            ends.append(outer)
            sizes.append(walk.pending_bytes())
            walk.next_segment()
    walk.down_to(-1)
    untils = [outer.call.uses_until for outer in ends]
    marks = [float(recording.num_bytes), *(float(outer.call.bytes_until) for outer in ends), 0.0]
    total = max(marks[0], 1.0)
    without_graph = (replace(outer, call=replace(outer.call, edges=())) for outer in outline.calls)
    return Segments(
        outline=Outline(calls=tuple(without_graph)),
        ends=tuple(outer.rank for outer in ends),
        of={(use.name, use.number): sum(i < until for until in untils) for i, use in enumerate(recording.uses)},
        leaves={name: frozenset(walk.leaf_segments.get(name, {len(ends)})) for name in leaves},
        boundaries=tuple(sizes),
        value_bytes=sum(outer.call.num_bytes for outer in outline.playable),
        made={k: (upper - lower) / total for k, (upper, lower) in enumerate(pairwise(marks))},
    )


class _Walk:
    """A walk down the graph that stops at what the calls up to some rank returned.

    Attributes:
        reached: The indices of the uses that were reached.
        pending: What it stopped at.
        leaf_segments: {leaf: the segments that reach it}.
    """

    def __init__(self, end: Tensor, recording: Recording, outline: Outline, leaves: Mapping[str, Tensor]) -> None:
        self._returned: dict[Edge, list[int]] = defaultdict(list)
        self._sizes: dict[Edge, int] = {}
        for outer in outline.playable:
            for index, edge in enumerate(outer.call.edges):
                if edge is not None:
                    self._returned[edge].append(outer.rank)
                    self._sizes[edge] = outer.call.sizes[index]
        self._uses = {node_of(use.output): index for index, use in enumerate(recording.uses)}
        self._leaves = {node_of(leaf): name for name, leaf in leaves.items()}
        self._seen: set[Edge] = set()
        self._segment = 0
        self.pending: set[Edge] = {edge_of(end)}
        self.left = set(self._uses.values())
        self.reached: set[int] = set()
        self.leaf_segments: dict[str, set[int]] = defaultdict(set)

    def down_to(self, floor: int) -> None:
        """Go on to what the calls up to `floor` returned."""
        waiting, self.pending = list(self.pending), set()
        while waiting:
            edge = waiting.pop()
            if any(rank <= floor for rank in self._returned.get(edge, ())):
                self.pending.add(edge)
                continue
            if edge in self._seen:
                continue
            self._seen.add(edge)
            node = edge[0]
            if node in self._uses:
                self.reached.add(self._uses[node])
            if node in self._leaves:
                self.leaf_segments[self._leaves[node]].add(self._segment)
            waiting += [child for child in node.next_functions if child[0] is not None]
        self.left -= self.reached

    def next_segment(self) -> None:
        """Count a boundary: leaves are reached again from below it."""
        self._segment += 1
        self._seen = {edge for edge in self._seen if edge[0] not in self._leaves}

    def pending_bytes(self) -> int:
        """Of all that was stopped at."""
        return sum(self._sizes[edge] for edge in self.pending)


def strays(
    roots: Iterable[Tensor], floor: Iterable[Tensor], uses: Sequence[Use], leaves: Mapping[str, Tensor]
) -> Iterator[str]:
    """Yield the parameters among some uses and leaves that the graph leads to from `roots`, not past `floor`."""
    names = {node_of(use.output): use.name for use in uses} | {node_of(leaf): name for name, leaf in leaves.items()}
    seen = {edge_of(tensor) for tensor in floor}
    waiting = [edge_of(root) for root in roots if root.requires_grad]
    while waiting:
        edge = waiting.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge[0] in names:
            yield names[edge[0]]
        waiting += [child for child in edge[0].next_functions if child[0] is not None]


def node_of(tensor: Tensor) -> Any:
    """The node of the autograd graph that a tensor's cotangent arrives at."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


def edge_of(tensor: Tensor) -> Edge:
    """That node, and which of its outputs the tensor is."""
    return node_of(tensor), tensor.output_nr
