"""How a pass is divided that comes down from the losses: what fits together runs in one group, whatever the device."""

from hypothesis import given
from hypothesis import strategies as st

from fisherfunc.gradients.factored.divide import Needs, from_the_losses
from fisherfunc.gradients.factored.loads import Tally
from fisherfunc.runtime.grain import CPU, GPU


def needs(room: int, graph: int, slot: int, held: list[int], slots: int, grain=CPU) -> Needs:
    return Needs(
        room=room,
        graph=lambda group: graph,
        slot=lambda group: slot,
        held=dict(zip("abcdefg", held, strict=False)),
        tally=Tally(num_tokens=64 * slots, num_sequences=64, num_slots=slots, itemsize=4, grain=grain),
        places=slots,
        causal=False,
    )


def test_sequences_side_by_side_are_given_up_before_parameters_are():
    """19 sequences of 15 bytes, times 1.75, leave 500 of 1,000 bytes; 10 of them leave room for 600."""
    found = from_the_losses(needs(1000, 10, 5, [300, 300], 1))
    assert (len(found.groups), found.width, found.slabbed) == (1, 10, ())
    assert found.num_bytes == 600 + int(1.75 * 10 * 15)
    assert from_the_losses(needs(1300, 10, 5, [300, 300], 1)).width == 24  # half of the memory is room enough
    assert len(from_the_losses(needs(620, 10, 5, [300, 300], 1)).groups) == 2  # not even with one at a time


@given(
    room=st.integers(100, 5000),
    more=st.integers(0, 5000),
    graph=st.integers(1, 50),
    slot=st.integers(1, 20),
    held=st.lists(st.integers(1, 600), min_size=1, max_size=6),
    slots=st.integers(1, 40),
    grain=st.sampled_from([CPU, GPU]),
)
def test_what_fits_in_one_group_is_not_divided_and_more_room_never_divides(room, more, graph, slot, held, slots, grain):
    small, large = (needs(size, graph, slot, held, slots, grain) for size in (room, room + more))
    found, roomier = from_the_losses(small), from_the_losses(large)
    if found.groups and not found.slabbed:
        assert found.num_bytes <= room
        assert len(roomier.groups) <= len(found.groups) and not roomier.slabbed
    if found.width > 1 and small.passing(found.chunk_size, 1) + sum(held) <= room:
        assert len(found.groups) == 1
