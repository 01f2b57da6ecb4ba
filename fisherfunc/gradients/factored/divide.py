"""How a pass is divided so that it fits the memory: slots of a chunk, sequences of a stack, groups of parameters.

What comes and goes in a pass is the graph of a stack, and cotangents for each slot of it; what is held are the factors
of a group. Without segments both have at least half the memory. A pass over one segment has the cotangents of it
alone: it takes more slots at a time, as the forward passes of prefixes are what each group repeats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fisherfunc.gradients.capture.segments import WHOLE, Carried, Segments
from fisherfunc.gradients.factored.groups import Group, grouped, held_by
from fisherfunc.gradients.factored.loads import Tally, chunk_of, prefix_share, stack_width, strip_share
from fisherfunc.runtime.grain import Grain

UNLIMITED = 2**62
SHARES = (0.5, 0.35, 0.3, 0.25, 0.21, 0.18, 0.14, 0.1)
"""Parts of the memory that passes over segments may leave for what comes and goes."""
FEWER = 0.8
TRIED = 7
"""So many numbers of slots are tried, each the part `FEWER` of the one before it."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a pass takes.

    Attributes:
        room: Bytes for all of it.
        graph: A group, all parameters where None → bytes of the passes over one sequence, beside cotangents.
        slot: A group, all parameters where None → bytes of the cotangents of one slot of one sequence.
        held: {name: bytes until its Gram is made}, in the order of the model.
        tally: How much there is.
        places: Of a sequence, at most.
        causal: Whether chunks run on prefixes.
        stacked: Whether sequences run together.
        chunk_size: Asked for; None where it is free.
        gram: Bytes of one.
    """

    room: int
    graph: Callable[[Group | None], int]
    slot: Callable[[Group | None], int]
    held: Mapping[str, int]
    tally: Tally
    places: int
    causal: bool
    stacked: bool = True
    chunk_size: int | None = None
    gram: int = 0

    @property
    def grain(self) -> Grain:
        """What suits the device."""
        return self.tally.grain

    def repeated(self, num_groups: int) -> float:
        """The forward passes of prefixes, in backward passes of a slot, for each chunk."""
        return self.grain.forward + self.grain.repeated * num_groups

    def passing(self, chunk_size: int, width: int, group: Group | None = None) -> int:
        """Bytes of what comes and goes."""
        return int(self.grain.allocated * width * (self.graph(group) + chunk_size * self.slot(group)))

    def held_share(self, chunk_size: int | None = None) -> float:
        """What strips hold, against whole sequences."""
        return strip_share(self.tally, self.places, causal=self.causal, chunk_size=chunk_size)

    def width(self, chunk_size: int, room: int) -> int:
        """The sequences of a stack."""
        each = self.graph(None) + chunk_size * self.slot(None) if room < UNLIMITED else 1
        found = min(stack_width(self.places, chunk_size, each, room, self.grain), self.tally.num_sequences)
        return found if self.stacked else 1


@dataclass(frozen=True, kw_only=True)
class Division:
    """How a pass is divided.

    Attributes:
        chunk_size: Slots a batched backward pass.
        width: The most sequences that run together.
        groups: What each pass over all tokens is for.
        slabbed: Parameters too large for a group.
        num_bytes: What comes and goes and what is held, at most.
        segments: How the model is divided.
    """

    chunk_size: int
    width: int
    groups: tuple[Group, ...]
    slabbed: tuple[str, ...]
    num_bytes: int
    segments: Segments = WHOLE


def from_the_losses(needs: Needs) -> Division:
    """Each group comes down from the losses."""
    room = int(needs.room / 2 / needs.grain.allocated)
    chunk, best = (
        chunk_of(needs.tally, causal=needs.causal, per_slot=needs.slot(None), room=some)
        for some in (room - needs.graph(None), UNLIMITED)
    )
    if needs.chunk_size is not None:
        chunk = best = min(needs.chunk_size, needs.tally.num_slots)
    width = needs.width(chunk, room)
    passing = needs.passing(chunk, width)
    most = needs.passing(best, needs.width(best, UNLIMITED))
    # Not room - passing: a larger limit may take larger chunks, and must not leave less for what is held.
    budget = needs.room - max(passing, min(needs.room // 2, most))
    groups, slabbed = grouped(needs.held, list(needs.held), budget)
    if slabbed and needs.chunk_size is None and (chunk, width) != (1, 1):  # where least comes and goes, more may fit
        chunk, width, passing = 1, 1, needs.passing(1, 1)
        groups, slabbed = grouped(needs.held, list(needs.held), max(needs.room - passing, 0))
    found = Division(
        chunk_size=chunk,
        width=width,
        groups=groups,
        slabbed=tuple(slabbed),
        num_bytes=passing + max(held_by(groups, needs.held), default=0),
    )
    return found if len(groups) == 1 and not slabbed else _undivided(needs, found)


def _undivided(needs: Needs, found: Division) -> Division:
    """All parameters in one group, where that fits with fewer sequences side by side."""
    width, held = found.width, sum(needs.held.values())
    while width > 1:
        width = -(-width // 2)
        passing = needs.passing(found.chunk_size, width)
        if passing + held <= needs.room:
            groups, slabbed = grouped(needs.held, list(needs.held), needs.room - passing)
            return replace(found, width=width, groups=groups, slabbed=tuple(slabbed), num_bytes=passing + held)
    return found


def divided(needs: Needs, segments: Segments, whole: Division, most: int) -> Division:
    """Each group starts where the one before it ended, if that fits and takes less than where it is not divided.

    Where all would fit in one group, its chunks and stacks are taken. Elsewhere, of the divisions that leave the fewest
    tensors to the dense route, the one that takes the least time. Backward passes and contraction of chunks of c slots
    take 1 + c/S, and (G + 1)/2 as much for G groups that all come down from the losses; forward passes take
    (forward + repeated G)/c, or forward G/c. The two numbers are measured on a CPU (GPT-2 124M, 1,008 tokens, limits of
    1 and 4 GB).

    Args:
        needs: What a pass takes.
        segments: How the model is divided.
        whole: The division where it is not.
        most: A group holds at most so many bytes, if more than one segment.
    """
    if len(whole.groups) == 1 and not whole.slabbed:
        groups, _ = grouped(needs.held, list(needs.held), max(most, *needs.held.values()), segments)
        sizes = held_by(groups, needs.held, segments)
        kept = _kept_bytes(needs, segments, whole.chunk_size)
        passing = [needs.passing(whole.chunk_size, whole.width, group) for group in groups]
        peak = kept + max(map(sum, zip(sizes, passing, strict=True)))
        if len(groups) == 1 or peak >= whole.num_bytes:
            return whole
        return replace(whole, groups=groups, num_bytes=peak, segments=segments)
    found = [
        division
        for where in (segments, segments.at_narrow())
        for slots in _numbers_of_slots(needs, whole)
        for share in SHARES
        if (division := _divided(needs, where, whole, slots, share, most)) is not None
    ]

    def cost(division: Division) -> tuple[int, float]:
        chunk, num_groups = division.chunk_size, len(division.groups)
        longer = 1 + chunk / needs.tally.num_slots
        if division.segments.ends:
            return len(division.slabbed), longer + needs.repeated(num_groups) / chunk
        return len(division.slabbed), longer * (num_groups + 1) / 2 + needs.grain.forward * num_groups / chunk

    return min([*found, whole], key=cost)


def _divided(needs: Needs, segments: Segments, whole: Division, slots: int, share: float, most: int) -> Division | None:
    """The division with at most so many slots, and about a part of the memory for what comes and goes.

    More slots are longer prefixes, of which more is held.
    """
    more = max(needs.held_share(slots) / needs.held_share(), 1.0)
    held = {name: int(more * size) for name, size in needs.held.items()}
    carried = {
        name: Carried(between=one.between, below=int(more * one.below)) for name, one in segments.carried.items()
    }
    longer = replace(segments, carried=carried)
    kept = _kept_bytes(needs, longer, slots)
    budget = min(int((1 - share) * needs.room) - kept, max(most, *held.values()))
    groups, too_large = grouped(held, list(held), budget, longer, first_less=_more_at_the_losses(needs))
    if not groups or set(too_large) - set(whole.slabbed):
        return None
    sizes = held_by(groups, held, longer)
    rooms = {
        group: int((needs.room - kept - size) / needs.grain.allocated)
        for group, size in zip(groups, sizes, strict=True)
    }
    chunk, width = _larger_chunk(needs, rooms, whole, slots)
    if chunk < slots:  # which ends in other segments of strips
        return _divided(needs, segments, whole, _even(chunk, needs.grain), share, most)
    if any(needs.passing(chunk, width, group) > needs.grain.allocated * room for group, room in rooms.items()):
        return None
    return Division(
        chunk_size=chunk,
        width=width,
        groups=groups,
        slabbed=tuple(too_large),
        num_bytes=kept + max(size + needs.passing(chunk, width, g) for g, size in zip(groups, sizes, strict=True)),
        segments=longer,
    )


def _more_at_the_losses(needs: Needs) -> int:
    """What comes and goes in the group that starts at the losses beyond what does in others."""
    first, other = Group(items=frozenset({("", 0)})), Group(items=frozenset({("", 1)}), start=1)
    return max(needs.passing(1, 1, first) - needs.passing(1, 1, other), 0)


def _kept_bytes(needs: Needs, segments: Segments, most: int) -> int:
    """The cotangents of all tokens at one boundary, stack by stack that above it or below; and of one stack at both.

    And all that outer calls return; and a Gram of the output layer that is held before those of lower uses are there.
    """
    tally = needs.tally
    stack = tally.num_slots * needs.width(needs.grain.slots, UNLIMITED)
    cotangents = (tally.num_tokens + stack) * prefix_share(tally, causal=needs.causal, chunk_size=most)
    values = tally.num_sequences * segments.value_bytes
    return int(segments.boundary_bytes * cotangents) + values + (needs.gram if segments.carried else 0)


def _numbers_of_slots(needs: Needs, whole: Division) -> list[int]:
    """What may be best, from where longer prefixes cost what fewer of them save on: √(S · all that is repeated).

    Fewer slots leave more memory for what is held, so that there are fewer groups.
    """
    if needs.chunk_size is not None or not needs.causal:
        return [whole.chunk_size]
    best = (needs.tally.num_slots * needs.repeated(len(whole.groups))) ** 0.5
    best = min(best, needs.grain.slots, needs.tally.num_slots)
    return list(dict.fromkeys(_even(max(1, round(best * FEWER**step)), needs.grain) for step in range(TRIED)))


def _even(slots: int, grain: Grain) -> int:
    """As many, or fewer so that chunks end with segments, or half of them."""
    return slots - slots % (grain.segment // 2) if slots > grain.segment // 2 else slots


def _larger_chunk(needs: Needs, rooms: Mapping[Group, int], whole: Division, most: int) -> tuple[int, int]:
    """As many slots as there is room for in each group, and sequences."""
    if needs.chunk_size is not None or not needs.causal:
        return whole.chunk_size, whole.width
    fitting = ((room - needs.graph(group)) // max(needs.slot(group), 1) for group, room in rooms.items())
    chunk = max(1, min(most, *fitting))
    widths = (room // max(needs.graph(group) + chunk * needs.slot(group), 1) for group, room in rooms.items())
    return chunk, max(1, min(needs.width(chunk, UNLIMITED), *widths))
