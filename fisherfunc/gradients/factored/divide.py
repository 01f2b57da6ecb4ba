"""How a pass is divided so that it fits the memory: slots of a chunk, sequences of a stack, groups of parameters.

What comes and goes in a pass is the graph of a stack, and cotangents for each slot of it; what is held are the factors
of a group. Without cuts both have at least half the memory. A pass from a cut has the cotangents of its own levels
alone: it takes more slots at a time, as the forward passes of prefixes are what each group repeats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fisherfunc.gradients.factored.cuts import Carried, Levels
from fisherfunc.gradients.factored.groups import Group, grouped, most_held
from fisherfunc.gradients.factored.loads import LARGEST_CHUNK, Tally, chunk_of, prefix_share, stack_width

ALLOCATED = 1.75
"""What an allocator takes for what comes and goes in a pass, against what is in use at a time; measured on a CPU."""
UNLIMITED = 2**62


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a pass takes.

    Attributes:
        room: Bytes for all of it.
        graph: Bytes of the passes over one sequence, beside cotangents.
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
    graph: int
    slot: Callable[[Group | None], int]
    held: Mapping[str, int]
    tally: Tally
    places: int
    causal: bool
    stacked: bool = True
    chunk_size: int | None = None
    gram: int = 0

    def passing(self, chunk_size: int, width: int, group: Group | None = None) -> int:
        """Bytes of what comes and goes."""
        return int(ALLOCATED * width * (self.graph + chunk_size * self.slot(group)))

    def width(self, chunk_size: int, room: int) -> int:
        """The sequences of a stack."""
        each = self.graph + chunk_size * self.slot(None) if room < UNLIMITED else 1
        found = min(stack_width(self.places, chunk_size, each, room), self.tally.num_sequences)
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
        levels: How the model is cut, where groups start at cuts.
    """

    chunk_size: int
    width: int
    groups: tuple[Group, ...]
    slabbed: tuple[str, ...]
    num_bytes: int
    levels: Levels = field(default_factory=Levels)


def from_the_losses(needs: Needs) -> Division:
    """Each group comes down from the losses."""
    room = int(needs.room / 2 / ALLOCATED)
    chunk, best = (
        chunk_of(needs.tally, causal=needs.causal, per_slot=needs.slot(None), room=some)
        for some in (room - needs.graph, UNLIMITED)
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
    return Division(
        chunk_size=chunk,
        width=width,
        groups=groups,
        slabbed=tuple(slabbed),
        num_bytes=passing + most_held(groups, needs.held),
    )


def from_cuts(needs: Needs, levels: Levels, plain: Division) -> Division | None:
    """Each group starts where the one before it ended; None where that does not fit.

    A quarter of the memory is for what comes and goes, or half, as without cuts.

    Args:
        needs: What a pass takes.
        levels: How the model is cut.
        plain: The division without cuts.
    """
    if not levels.cuts:
        return None
    most = _most_slots(needs, plain)
    longer = prefix_share(needs.tally, causal=needs.causal, chunk_size=most) / prefix_share(
        needs.tally, causal=needs.causal
    )
    longer = max(longer, 1.0)
    held = {name: int(longer * size) for name, size in needs.held.items() if name not in plain.slabbed}
    carried = {
        name: Carried(between=one.between, below=int(longer * one.below)) for name, one in levels.carried.items()
    }
    levels = replace(levels, carried=carried)
    kept = int(longer * _kept_bytes(needs, levels))
    for share in (0.25, 0.5):
        budget = int((1 - share) * needs.room) - kept
        groups, too_large = grouped(held, list(held), budget, levels)
        if too_large or most_held(groups, held, levels) > budget:
            continue
        chunk, width = _larger_chunk(needs, groups, plain, most, int(share * needs.room))
        passing = max((needs.passing(chunk, width, group) for group in groups), default=0)
        if passing <= share * needs.room:
            return Division(
                chunk_size=chunk,
                width=width,
                groups=groups,
                slabbed=plain.slabbed,
                num_bytes=passing + kept + most_held(groups, held, levels),
                levels=levels,
            )
    return None


def _kept_bytes(needs: Needs, levels: Levels) -> int:
    """The cotangents of all tokens at one cut, stack by stack that above it or that below; and of one stack at both.

    And the values of all cuts; and for a Gram of the output layer that is held before those of lower uses are there.
    """
    tally = needs.tally
    stack = tally.num_slots * needs.width(LARGEST_CHUNK, UNLIMITED)
    cotangents = (tally.num_tokens + stack) * prefix_share(tally, causal=needs.causal)
    values = tally.num_sequences * len(levels.cuts)
    return int(levels.cut_bytes * (cotangents + values)) + (needs.gram if levels.carried else 0)


def _most_slots(needs: Needs, plain: Division) -> int:
    """Slots for groups that repeat half of the prefixes' forward passes each: √(S · half of them)."""
    if needs.chunk_size is not None or not needs.causal:
        return plain.chunk_size
    best = round((needs.tally.num_slots * (len(plain.groups) + 1) / 2) ** 0.5)
    return max(1, min(best, LARGEST_CHUNK, needs.tally.num_slots))


def _larger_chunk(needs: Needs, groups: Sequence[Group], plain: Division, most: int, room: int) -> tuple[int, int]:
    """As many slots as there is room for, and sequences."""
    if needs.chunk_size is not None or not needs.causal:
        return plain.chunk_size, plain.width
    slot = max(needs.slot(group) for group in groups)
    fitting = int(room / ALLOCATED - needs.graph) // max(slot, 1)
    chunk = max(1, min(most, fitting))
    wanted = needs.width(chunk, UNLIMITED)
    return chunk, max(1, min(wanted, int(room / ALLOCATED) // (needs.graph + chunk * slot)))
