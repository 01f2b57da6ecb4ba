"""Groups: which parameters a pass over all tokens is for, so that what is held of them fits the memory.

Without cuts every group comes down from the losses. With cuts (cuts.py) the groups follow the levels of the model from
the last to the first, and each starts where those before it left the cotangents; a level that does not fit is divided.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fisherfunc.gradients.factored.cuts import WHOLE_WAY, Key, Leg, Levels
from fisherfunc.gradients.factored.known import Known

Item = tuple[str, int]
"""A parameter and a level in which it is used."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """What one pass over all tokens is for.

    Attributes:
        items: The parameters, each with the levels in which its uses are taken.
        start: The level that it starts in.
    """

    items: frozenset[Item]
    start: int = 0

    @property
    def names(self) -> frozenset[str]:
        """The parameters."""
        return frozenset(name for name, _ in self.items)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a pass takes, and on which part of the way down.

    Attributes:
        group: What it takes.
        levels: How the model is cut.
        leg: Where it starts, and where it keeps its cotangents.
        above: The cotangents that it starts from, chunk by chunk, where it starts at a cut.
        known: What the model gives at its cuts, where it is cut.
    """

    group: Group
    levels: Levels = field(default_factory=Levels)
    leg: Leg = WHOLE_WAY
    above: Sequence[Tensor] = ()
    known: Known | None = None

    @property
    def floor(self) -> Tensor | None:
        """What the forward pass goes on from; None where it runs the whole model."""
        return None if self.known is None else self.known.at_floor(self.leg)

    def takes(self, name: str, number: int) -> bool:
        """Whether a use is among what is taken; −1 stands for a leaf."""
        return (name, self.levels.of.get((name, number), 0)) in self.group.items

    def knows(self, name: str, number: int) -> bool:
        """Whether it is said in which level a use lies, and so which pass takes it; without cuts all passes may."""
        return not self.levels.cuts or (name, number) in self.levels.of

    def above_end(self) -> set[Key]:
        """The uses and leaves that lie above the cut where cotangents are kept."""
        end = len(self.levels.cuts) if self.leg.end is None else self.levels.cuts.index(self.leg.end)
        return {key for key, level in self.levels.of.items() if level <= end}


def everything(names: Iterable[str]) -> Group:
    """All parameters in one pass of a model that is not cut."""
    return Group(items=frozenset((name, 0) for name in names))


def grouped(
    held: Mapping[str, int], order: Sequence[str], budget: int, levels: Levels | None = None, *, first_less: int = 0
) -> tuple[tuple[Group, ...], list[str]]:
    """Groups of parameters that fit the budget together, from the last to the first, and parameters that never fit.

    Args:
        held: {name: bytes until its Gram is made}; a parameter is held until its last item was taken.
        order: The parameters.
        budget: In bytes.
        levels: How the model is cut.
        first_less: By how much the budget of the first group is smaller; it takes one parameter in any case.
    """
    levels = levels or Levels()
    too_large = [name for name in order if held[name] > budget]
    items = _from_the_last([name for name in order if name not in too_large], levels)
    last = {name: index for index, (name, _) in enumerate(items)}
    groups: list[list[Item]] = []
    open_: dict[str, int] = {}
    for index, item in enumerate(items):
        more = _taking([item], held, levels)
        room = budget - first_less if len(groups) == 1 else budget
        if groups and sum((open_ | _larger(more, open_)).values()) > max(room, sum(open_.values())):
            open_ = _left_open(open_, [n for n in open_ if last[n] >= index], levels)
            groups.append([])
        if not groups:
            groups.append([])
        open_ |= _larger(more, open_)
        groups[-1].append(item)
    return tuple(Group(items=frozenset(group), start=min(level for _, level in group)) for group in groups), too_large


def held_by(groups: Sequence[Group], held: Mapping[str, int], levels: Levels | None = None) -> list[int]:
    """The bytes that are held when each group was taken."""
    found, open_ = list[int](), dict[str, int]()
    for number, group in enumerate(groups):
        open_ |= _larger(_taking(group.items, held, levels or Levels()), open_)
        found.append(sum(open_.values()))
        open_ = _left_open(open_, open_.keys() & names_of(groups[number + 1 :]), levels or Levels())
    return found


def _taking(items: Iterable[Item], held: Mapping[str, int], levels: Levels) -> dict[str, int]:
    """What is held of each parameter when some items are taken, the last level first."""
    below = {name: carried.below for name, carried in levels.carried.items()}
    ordered = sorted(items, key=lambda item: -item[1])
    return {name: held[name] if level == 0 else below.get(name, held[name]) for name, level in ordered}


def _larger(more: Mapping[str, int], open_: Mapping[str, int]) -> dict[str, int]:
    return {name: max(size, open_.get(name, 0)) for name, size in more.items()}


def _left_open(open_: Mapping[str, int], names: Iterable[str], levels: Levels) -> dict[str, int]:
    """What is held of some names after a group."""
    between = {name: carried.between for name, carried in levels.carried.items()}
    return {name: min(open_[name], between.get(name, open_[name])) for name in names}


def names_of(groups: Iterable[Group]) -> set[str]:
    """The parameters of some groups."""
    return {name for group in groups for name in group.names}


def leg_of(groups: Sequence[Group], number: int, levels: Levels) -> Leg:
    """Where the pass of a group starts, where it keeps its cotangents for the next, and below what it wants nothing."""
    start = groups[number].start
    following = groups[number + 1].start if number + 1 < len(groups) else start
    lowest = max(level for _, level in groups[number].items)
    deepest = max(lowest, following - 1)
    floor = levels.cuts[deepest] if deepest < len(levels.cuts) else None
    return Leg(
        start=levels.cuts[start - 1] if start else None,
        end=levels.cuts[following - 1] if following > start else None,
        floor=floor,
        skipped={} if floor is None else {call.name: call for call in levels.skipped.get(floor, ())},
    )


def _from_the_last(names: Sequence[str], levels: Levels) -> list[Item]:
    """The items in the order in which they are taken; those of parameters used in several levels lead each level."""
    where: dict[str, set[int]] = {name: set() for name in names}
    for (name, _), level in levels.of.items():
        if name in where:
            where[name].add(level)
    places = {name: place for place, name in enumerate(names)}
    items = [(name, level) for name in names for level in where[name] or {0}]
    return sorted(items, key=lambda item: (item[1], len(where[item[0]]) < 2, -places[item[0]]))
