"""Cuts: tensors between the losses and the parameters that every cotangent goes through on its way down.

Between two cuts lies a level of the model, such as a block of a transformer. A pass that starts from the cotangents
kept at a cut need not come down from the losses again. Found in the autograd graph, never from a module's name: nodes
are taken from the end in an order in which all that leads to a node comes before it; where one node alone is waiting,
nothing bypasses it. What is found on one sequence is held against every other one (strays).
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.factored.calls import Call, Made
from fisherfunc.gradients.factored.recording import Use
from fisherfunc.gradients.factored.skips import ModuleCall

Key = tuple[str, int]
"""A parameter and which use of it; −1 for a leaf of the graph."""

Edge = tuple[Any, int]
"""A node of the autograd graph, and which of its outputs: a function that returns several tensors is one node."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """Bytes held of a parameter of the output layer that is looked up by ids below.

    Attributes:
        between: After level 0, when its own Gram was made: what the lookups need of it.
        below: That, and the factors of the lookups.
    """

    between: int
    below: int


@dataclass(frozen=True, kw_only=True)
class Levels:
    """How a model is cut.

    Attributes:
        cuts: The calls of torch functions that make the cut tensors (`Recording.made`), from the last to the first:
            cut k lies below level k.
        of: The level of each use and leaf; all are level 0 where there are no cuts.
        cut_bytes: Of the largest cut tensor.
        carried: {parameter of the output layer that is looked up by ids below: what is held of it after level 0}.
        skipped: {cut: the modules that need not be called where it is known}.
    """

    cuts: tuple[Call, ...] = ()
    of: Mapping[Key, int] = field(default_factory=dict)
    cut_bytes: int = 0
    carried: Mapping[str, Carried] = field(default_factory=dict)
    skipped: Mapping[Call, tuple[ModuleCall, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A part of the way down.

    Attributes:
        start: The call that makes the cut where it starts; at the losses where None.
        end: The call that makes the cut whose cotangents it keeps; none where None.
        floor: The call that makes a cut below all that is wanted: what leads to it need not be run again.
        skipped: {module: its call}, of those below the floor.
    """

    start: Call | None = None
    end: Call | None = None
    floor: Call | None = None
    skipped: Mapping[str, ModuleCall] = field(default_factory=dict)


WHOLE_WAY = Leg()


def levels_of(end: Tensor, made: Mapping[Edge, Made], targets: Mapping[Key, Tensor], *, places: int | None) -> Levels:
    """Cut the graph below a tensor.

    Args:
        end: Where the cotangents start.
        made: {graph node and output: the tensor that it stands for}.
        targets: What the cotangents are pulled back to; what is not reached goes to the last level.
        places: Where given, a cut tensor must be `(b, s, …)` with so many places, so that a prefix has its first ones.
    """
    order, touched, outputs = _from_the_end(end)
    spans = _spans(touched)
    steps: dict[Any, float] = {node: step for step, (node, _) in enumerate(order)}
    steps |= {leaf: steps[0] + 0.5 for leaf, steps in touched.items()}  # below the node that leads to it
    nodes = {key: node_of(tensor) for key, tensor in targets.items()}
    at = {key: steps.get(node, float(len(order))) for key, node in nodes.items()}
    cuts: list[tuple[int, Made]] = []
    for step, (node, waiting) in enumerate(order):
        if waiting or any(first < step <= last for first, last in spans) or not any(s > step for s in at.values()):
            continue
        edge = (node, min(outputs[node]))
        if len(outputs[node]) > 1 or edge not in made or not _has_places(made[edge], places):
            continue
        above = cuts[-1][0] if cuts else -1
        if any(above < s <= step for s in at.values()):
            cuts.append((step, made[edge]))
        elif cuts:  # the lowest of several: what lies between may be written to by the model
            cuts[-1] = (step, made[edge])
    return Levels(
        cuts=tuple(tensor.call for _, tensor in cuts),
        of={key: sum(cut < step for cut, _ in cuts) for key, step in at.items()},
        cut_bytes=max((tensor.num_bytes for _, tensor in cuts), default=0),
    )


def strays(
    start: Tensor, cut: Tensor, uses: Iterable[Use], leaves: Mapping[str, Tensor], here: Container[Key]
) -> list[str]:
    """The parameters that the graph leads to from `start` past a cut, though they are none of those above it.

    Args:
        start: Where the cotangents of a pass start.
        cut: Where they are to be kept.
        uses: Of a recorded forward pass.
        leaves: Its leaves.
        here: The uses and leaves above the cut.
    """
    below: dict[Any, str] = {node_of(u.output): u.name for u in uses if (u.name, u.number) not in here}
    below |= {node_of(leaf): name for name, leaf in leaves.items() if (name, -1) not in here}
    seen = {_edge_of(cut)}
    return sorted({below[node] for node, _ in _reached(_edge_of(start), seen) if node in below})


def node_of(tensor: Tensor) -> Any:
    """The node of the autograd graph that a tensor's cotangent arrives at."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


def _edge_of(tensor: Tensor) -> Edge:
    return node_of(tensor), tensor.output_nr


def _reached(root: Edge, seen: set[Edge]) -> Iterator[Edge]:
    """The edges from a root on; not those seen, nor beyond them."""
    left = [root]
    while left:
        edge = left.pop()
        if edge not in seen:
            seen.add(edge)
            yield edge
            left += _edges(edge[0])


def _has_places(tensor: Made, places: int | None) -> bool:
    return places is None or (len(tensor.shape) > 2 and tensor.shape[1] == places)


def _from_the_end(end: Tensor) -> tuple[list[tuple[Any, int]], dict[Any, list[int]], dict[Any, set[int]]]:
    """Nodes in order with how many others were waiting, the steps that reached each leaf, the outputs of each node."""
    root = node_of(end)
    outputs: dict[Any, set[int]] = defaultdict(set)
    for node, output in _reached(_edge_of(end), set()):
        outputs[node].add(output)
    missing = Counter(child for node in outputs for child, _ in _edges(node))
    order: list[tuple[Any, int]] = []
    touched: dict[Any, list[int]] = {}
    ready = [(0, 0, root)]
    waiting: set[Any] = set()
    while ready:
        node = heappop(ready)[-1]
        order.append((node, len(ready) + len(waiting)))
        for child, _ in _edges(node):
            if hasattr(child, "variable"):
                touched.setdefault(child, []).append(len(order) - 1)
                continue
            missing[child] -= 1
            waiting.add(child)
            if not missing[child]:
                waiting.discard(child)
                heappush(ready, (-child._sequence_nr(), len(order), child))  # what was made last comes first
    return order, touched, outputs


def _edges(node: Any) -> list[Edge]:
    return [edge for edge in node.next_functions if edge[0] is not None]


def _spans(touched: Mapping[Any, list[int]]) -> list[tuple[int, int]]:
    """From the first to the last step at which a leaf was reached: no cut may lie between."""
    return [(min(steps), max(steps)) for steps in touched.values() if min(steps) < max(steps)]
