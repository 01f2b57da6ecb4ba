"""Groups: which parameters a pass over all tokens is for, so that what is held of them fits the memory.

Groups follow the segments of the model from the losses down, several segments each or, where one does not fit, a part
of its parameters. Each starts where those before it left the cotangents.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fisherfunc.gradients.capture.calls import Output, Way
from fisherfunc.gradients.capture.segments import WHOLE, Key, Segments

Item = tuple[str, int]
"""A parameter and a segment in which it is used."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one pass over all tokens is for.

    Attributes:
        items: The parameters, each with the segments in which its uses are taken.
        start: The segment that it starts in.
    """

    items: frozenset[Item]
    start: int = 0

    @property
    def names(self) -> frozenset[str]:
        """The parameters."""
        return frozenset(name for name, _ in self.items)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What was seen of one stack of sequences.

    Attributes:
        losses: Its losses.
        returned: What its outer calls returned.
        ids: {parameter that is looked up: the ids, in ascending order}.
        marks: {use: a number that shows what went into it}.
    """

    losses: Tensor
    returned: Mapping[Output, Tensor]
    ids: Mapping[str, Tensor]
    marks: Mapping[Key, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a pass over one stack takes, and on which part of the way down.

    Attributes:
        group: What it takes.
        expected: The parameters that it may meet, where the model is divided.
        segments: How the model is divided.
        last: The last segment that it passes.
        above: The cotangents that it starts from, chunk by chunk, where it does not start at the losses.
        below: Where the cotangents at its lower end go, chunk by chunk, where another one goes on from there.
        recorded: What was seen of the stack, where the model is divided.
    """

    group: Group
    expected: frozenset[str] = frozenset()
    segments: Segments = WHOLE
    last: int = 0
    above: Sequence[Mapping[Output, Tensor]] = ()
    below: list[Mapping[Output, Tensor]] | None = None
    recorded: Recorded | None = None

    @property
    def from_losses(self) -> bool:
        """Whether it starts there."""
        return self.group.start == 0

    @property
    def floor(self) -> int:
        """The call below all that it passes."""
        return self.segments.floor(self.last)

    def way(self) -> Way | None:
        """What its forward passes play back, and where they end; None where the model is not divided."""
        if self.recorded is None:
            return None
        played = {output: value for output, value in self.recorded.returned.items() if output[0] <= self.floor}
        return Way(
            outline=self.segments.outline, played=played, floor=self.floor, end=self.segments.end(self.group.start)
        )

    def meets(self, leaf: str) -> bool:
        """Whether a leaf of the graph is reached on the way."""
        return any(self.group.start <= k <= self.last for k in self.segments.leaves.get(leaf, {0}))


def everything(names: Iterable[str]) -> Group:
    """All parameters in one pass of a model that is not divided."""
    return Group(items=frozenset((name, 0) for name in names))


def grouped(
    held: Mapping[str, int], order: Sequence[str], budget: int, segments: Segments = WHOLE, *, first_less: int = 0
) -> tuple[tuple[Group, ...], list[str]]:
    """Groups of parameters that fit the budget together, from the losses down, and parameters that never fit.

    Args:
        held: {name: bytes until its Gram is made}; a parameter is held until its last item was taken.
        order: The parameters.
        budget: In bytes.
        segments: How the model is divided.
        first_less: By how much the budget of the first group is smaller; it takes one parameter in any case.
    """
    too_large = [name for name in order if held[name] > budget]
    by_segment = _by_segment([name for name in order if name not in too_large], segments)
    last = {name: segment for segment, items in by_segment.items() for name, _ in items}
    groups: list[list[Item]] = []
    open_: dict[str, int] = {}
    divided = True  # what is divided is no part of a larger group
    for segment, items in by_segment.items():
        more = _larger(_taking(items, held, segments), open_)
        room = budget - first_less if len(groups) == 1 else budget
        if divided or sum((open_ | more).values()) > max(room, sum(open_.values())):
            open_ = _left_open(open_, [n for n in open_ if last[n] >= segment], segments)
            more = _larger(_taking(items, held, segments), open_)
            parts = _parts(items, open_, held, segments, budget if groups else budget - first_less)
            divided = len(parts) > 1
            groups += parts
        else:
            groups[-1] += items
        open_ |= more
    starts = [min(segment for _, segment in group) for group in groups]
    top = min(starts, default=0)  # what lies above it has no parameters, and is part of it
    starts = [0 if start == top else start for start in starts]
    return tuple(Group(items=frozenset(g), start=start) for g, start in zip(groups, starts, strict=True)), too_large


def _parts(
    items: Sequence[Item], open_: Mapping[str, int], held: Mapping[str, int], segments: Segments, room: int
) -> list[list[Item]]:
    """The items of one segment in as few parts as fit, each of at least one."""
    parts: list[list[Item]] = [[]]
    here = dict(open_)
    last = {name: number for number, (name, _) in enumerate(items)}
    for number, item in enumerate(items):
        more = _larger(_taking([item], held, segments), here)
        if parts[-1] and sum((here | more).values()) > max(room, sum(here.values())):
            waiting = [n for n in here if n in open_ or last.get(n, -1) >= number]
            here = _left_open(here, waiting, segments)
            parts.append([])
        here |= more
        parts[-1].append(item)
    return parts


def held_by(groups: Sequence[Group], held: Mapping[str, int], segments: Segments = WHOLE) -> list[int]:
    """The bytes that are held when each group was taken."""
    found, open_ = list[int](), dict[str, int]()
    for number, group in enumerate(groups):
        open_ |= _larger(_taking(group.items, held, segments), open_)
        found.append(sum(open_.values()))
        open_ = _left_open(open_, open_.keys() & names_of(groups[number + 1 :]), segments)
    return found


def _taking(items: Iterable[Item], held: Mapping[str, int], segments: Segments) -> dict[str, int]:
    """What is held of each parameter when some items are taken, the last segment first."""
    below = {name: carried.below for name, carried in segments.carried.items()}
    ordered = sorted(items, key=lambda item: -item[1])
    return {name: held[name] if segment == 0 else below.get(name, held[name]) for name, segment in ordered}


def _larger(more: Mapping[str, int], open_: Mapping[str, int]) -> dict[str, int]:
    return {name: max(size, open_.get(name, 0)) for name, size in more.items()}


def _left_open(open_: Mapping[str, int], names: Iterable[str], segments: Segments) -> dict[str, int]:
    """What is held of some names after a group."""
    between = {name: carried.between for name, carried in segments.carried.items()}
    return {name: min(open_[name], between.get(name, open_[name])) for name in names}


def names_of(groups: Iterable[Group]) -> set[str]:
    """The parameters of some groups."""
    return {name for group in groups for name in group.names}


def passed_by(groups: Sequence[Group], number: int, segments: Segments) -> tuple[int, bool]:
    """The last segment that a group passes, and whether another group goes on from there."""
    start = groups[number].start
    following = next((group.start for group in groups[number + 1 :] if group.start > start), None)
    last = max(segment for _, segment in groups[number].items) if following is None else following - 1
    return last, number + 1 < len(groups) and groups[number + 1].start > start


def _by_segment(names: Sequence[str], segments: Segments) -> dict[int, list[Item]]:
    """The items of each segment in the order in which they are taken; parameters used in several lead each."""
    where: dict[str, set[int]] = {name: set(segments.leaves.get(name, ())) for name in names}
    for (name, _), segment in segments.of.items():
        if name in where:
            where[name].add(segment)
    places = {name: place for place, name in enumerate(names)}
    found: dict[int, list[Item]] = {}
    for name in names:
        for segment in where[name] or {0}:
            found.setdefault(segment, []).append((name, segment))
    return {
        segment: sorted(found[segment], key=lambda item: (len(where[item[0]]) < 2, -places[item[0]]))
        for segment in sorted(found)
    }
