"""Calls of the modules of a model: which are run as a whole, or played back, and which are opened.

The calls that a model makes itself are its outer calls: those of the blocks of a transformer, say. A call too large is
opened, and those inside it are outer calls too. A call is run, or played back: its caller gets what it returned before,
as leaves of the graph. As a module may be called twice, calls are told by their order: that in which they begin, where
they are recognised, and that in which they end, their rank, by which all is kept that they return.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Output = tuple[int, int]
"""An outer call, by its rank, and which of the tensors that it returned."""


@dataclass(frozen=True, kw_only=True)
class Returned:
    """What a module returned: tensors in the graph, alone or in a tuple.

    Attributes:
        shapes: Of each; None for None.
        alone: Whether it is one tensor, and no tuple.
    """

    shapes: tuple[tuple[int, ...] | None, ...]
    alone: bool

    def is_like(self, other: "Returned | None") -> bool:
        """Whether both have a tensor, or none, in the same entries."""
        return other is not None and self.alone == other.alone and self.missing == other.missing

    @property
    def missing(self) -> tuple[bool, ...]:
        """Which entries are None."""
        return tuple(shape is None for shape in self.shapes)


def returned_by(result: Any) -> Returned | None:
    """What a module returned, where it can be played back; a mask, say, is no part of the graph and cannot."""
    values = result if type(result) is tuple else (result,)
    tensors = [value for value in values if value is not None]
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        return None
    shapes = tuple(None if value is None else tuple(value.shape) for value in values)
    return Returned(shapes=shapes, alone=result is not values)


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """A call of a module inside the model.

    Attributes:
        name: Of the module.
        began: How many modules had begun before it.
        ended: How many had ended before it.
        others: How many began inside of it.
        uses: {parameter: how many of its uses are inside}.
        uses_until: How many uses there were until it ended.
        bytes_until: How many bytes had been made in the graph until it ended.
        returned: What it returned; None where that cannot be played back.
        edges: Of the graph, for each tensor that it returned; None for None.
        sizes: Of these, in bytes.
    """

    name: str
    began: int
    ended: int
    others: int
    uses: Mapping[str, int]
    uses_until: int
    bytes_until: int
    returned: Returned | None
    edges: tuple[Any, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of all that it returned."""
        return sum(self.sizes)


@dataclass(frozen=True, kw_only=True)
class OuterCall:
    """A call that is run, opened or played back.

    Attributes:
        call: The call.
        rank: How many outer calls end before it.
        inside: How many outer calls begin inside of it: none, unless it is opened.
        opened: Whether its modules are called as outer calls.
        playable: Whether it can be played back.
    """

    call: ModuleCall
    rank: int
    inside: int
    opened: bool
    playable: bool


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The outer calls of a model, in the order in which they begin."""

    calls: tuple[OuterCall, ...] = ()

    @property
    def playable(self) -> list[OuterCall]:
        """Those that can be played back, in the order in which they end."""
        return sorted((one for one in self.calls if one.playable), key=lambda one: one.rank)


@dataclass(frozen=True, kw_only=True)
class Way:
    """What a forward pass plays back, and where it ends.

    Attributes:
        outline: The outer calls.
        played: What the calls up to `floor` returned.
        floor: The rank of the last call that is played back, with all that end before it.
        end: The rank of the call after which the pass ends; it runs to the losses where None.
    """

    outline: Outline
    played: Mapping[Output, Tensor] = field(default_factory=dict)
    floor: int = -1
    end: int | None = None


def outline_of(
    calls: Iterable[ModuleCall], held: Callable[[ModuleCall], int], most: int, places: int | None
) -> Outline:
    """Open the calls that hold more than so much, and those that cannot be played back.

    Args:
        calls: All that were noted of a pass over one sequence.
        held: A call → the bytes that the uses inside it hold.
        most: In bytes.
        places: Where given, prefixes are run: all that a call returns must be `(b, s, …)` with so many places.
    """
    outer: list[tuple[ModuleCall, bool, bool]] = []
    until = -1  # calls that began up to here are inside of the last one that is not opened
    for call in sorted(calls, key=lambda one: one.began):
        if call.began > until:
            playable = _is_playable(call, places)
            opened = not playable or (call.others > 0 and held(call) > most)
            outer.append((call, opened, playable))
            until = until if opened else call.began + call.others
    ends = sorted(range(len(outer)), key=lambda number: outer[number][0].ended)
    ranks = {number: rank for rank, number in enumerate(ends)}
    began = [call.began for call, *_ in outer]
    return Outline(
        calls=tuple(
            OuterCall(
                call=call,
                rank=ranks[number],
                inside=sum(call.began < other <= call.began + call.others for other in began),
                opened=opened,
                playable=playable,
            )
            for number, (call, opened, playable) in enumerate(outer)
        )
    )


def _is_playable(call: ModuleCall, places: int | None) -> bool:
    if call.returned is None:
        return False
    return all(s is None or places is None or (len(s) > 1 and s[1] == places) for s in call.returned.shapes)
