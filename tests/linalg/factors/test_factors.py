"""Grams of factored gradients against those of the gradients themselves, formed by autograd."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from fisherfunc.distributed.packing import Room, flat, parted
from fisherfunc.gradients.factored.loads import Tally, strip_share
from fisherfunc.gradients.factors.contract import Holder, joined
from fisherfunc.gradients.factors.pieces import Piece
from fisherfunc.gradients.rows.stacks import Stack
from fisherfunc.linalg.factors import strips as strips_module
from fisherfunc.linalg.factors.by_id import add_by_id
from fisherfunc.linalg.factors.crossing import Parts, add_crossing, unpacked
from fisherfunc.linalg.factors.factors import PointFactors, SharedFactors, cross_gram, form_gradients
from fisherfunc.linalg.factors.strips import Strip, add_strips, empty_strip, whole_strip
from fisherfunc.runtime.grain import CPU, divided_as
from fisherfunc.runtime.threads import Workspace

SHAPE = (5, 7)
KINDS = ["linear", "conv1d", "embedding", "point", "point of conv1d", "points of one input"]


def factors(kind: str, seed: int, *, rows: int = 3, places: int = 4) -> SharedFactors | PointFactors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out, into = SHAPE
    if kind == "linear":
        return SharedFactors(own=normal(rows, places, out), shared=normal(places, into), axis=0)
    if kind == "conv1d":
        return SharedFactors(own=normal(rows, places, into), shared=normal(places, out), axis=1)
    if kind == "embedding":
        ids = torch.randint(out, (places,), generator=generator)
        return SharedFactors(own=normal(rows, places, into), shared=ids, axis=1)
    if kind == "point of conv1d":
        return PointFactors(own=normal(rows, into), shared=normal(rows, out), axis=1)
    if kind == "points of one input":
        index = torch.arange(rows) // 2
        return PointFactors(own=normal(rows, out), shared=normal(rows, into), axis=0, index=index)
    return PointFactors(own=normal(rows, out), shared=normal(rows, into), axis=0)


def gradients(part: SharedFactors | PointFactors) -> torch.Tensor:
    """Each row's gradient by autograd through the map that its kind stands for."""
    weight = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    if isinstance(part, PointFactors):
        inputs = part.shared if part.index is None else part.shared[part.index]
        losses = torch.einsum(
            "ni,ij,nj->n", *((part.own, weight, inputs) if part.axis == 0 else (inputs, weight, part.own))
        )
    elif part.axis == 0:
        losses = torch.einsum("nsi,ij,sj->n", part.own, weight, part.shared[: part.own.shape[1]])
    else:
        shared = part.shared[: part.own.shape[1]]
        outputs = weight[shared] if shared.ndim == 1 else shared @ weight
        losses = (part.own * outputs).sum(dim=(1, 2))
    return torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])


@pytest.mark.parametrize("kind", KINDS)
def test_formed_gradients_equal_autograd(kind):
    part = factors(kind, 1)
    assert_close(form_gradients(part, SHAPE), gradients(part), atol=1e-12, rtol=0)


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_cross_grams_equal_inner_products_of_gradients(one, other):
    rows, columns = factors(one, 1), factors(other, 2, rows=4, places=6)
    expected = gradients(rows).flatten(1) @ gradients(columns).flatten(1).T
    assert_close(cross_gram(rows, columns).double(), expected, atol=1e-11, rtol=0)


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_equal_inputs_of_neighbours_are_held_once(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    each = torch.randint(3, (len(counts), 4), generator=generator).double()
    shared = each.repeat_interleave(torch.tensor(counts), dim=0)
    own = torch.randn(len(shared), 2, generator=generator, dtype=torch.float64)
    found = PointFactors(own=own, shared=shared, axis=0).merged()
    distinct = shared.unique_consecutive(dim=0)
    assert torch.equal(found.inputs, shared) and torch.equal(found.own, own)
    assert torch.equal(found.shared, distinct if 2 * len(distinct) <= len(shared) else shared)
    assert found.merged() is found or found.index is None


def test_inputs_that_are_no_numbers_are_never_equal():
    points = PointFactors(own=torch.ones(4, 2), shared=torch.full((4, 3), torch.nan), axis=0)
    assert points.merged() is points


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_own_factors_may_cover_the_first_places_only(kind):
    whole = factors(kind, 1)
    part = SharedFactors(own=whole.own[:, :2], shared=whole.shared, axis=whole.axis)
    other = factors("point", 2)
    expected = gradients(part).flatten(1) @ gradients(other).flatten(1).T
    assert_close(cross_gram(part, other), expected, atol=1e-11, rtol=0)


@given(
    kind=st.sampled_from(["linear", "conv1d", "embedding"]),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3),
    features=st.integers(1, 9),
    segment=st.integers(1, 3),
    reaches=st.sampled_from(["all", "growing", "any"]),
    seed=st.integers(0, 1000),
)
def test_strips_sum_to_the_gram_of_all_rows(kind, sizes, features, segment, reaches, seed):
    """Whatever the block of features, and whether rows reach all places, a growing number of them, or any.

    And they are crossed with what was packed of them, as another rank gets it, to the same.
    """
    order = random.Random(seed)
    total = sum(rows for rows, _ in sizes)
    gram, formed, strips, start = torch.zeros(total, total, dtype=torch.float64), [], [], 0
    with divided_as(replace(CPU, features=features, segment=segment)):
        for index, (rows, places) in enumerate(sizes):
            whole = factors(kind, seed + index, rows=rows, places=places)
            strip = empty_strip(slice(start, start + rows), whole)
            strip.own.fill_(torch.nan)
            for row in range(rows):
                reach = {"all": places, "growing": min(row + 1, places), "any": order.randint(1, places)}[reaches]
                own = whole.own[row : row + 1, :reach]
                strip.put(row, own)
                formed.append(gradients(SharedFactors(own=own, shared=whole.shared, axis=whole.axis)).flatten(1))
            strips.append(strip)
            start += rows
        add_strips(gram, strips)
        here, crossed = Parts(num_rows=total, strips=tuple(strips)), torch.zeros_like(gram)
        tensors, about = here.packed()
        sent = parted(flat(tensors, gram, Room()), [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])
        add_crossing(crossed, here, unpacked(sent, about), Workspace())
    matrix = torch.cat(formed)
    assert_close(gram, matrix @ matrix.T, atol=1e-10, rtol=0)
    assert_close(crossed, matrix @ matrix.T, atol=1e-10, rtol=0)
    if kind == "embedding":
        by_id = torch.zeros_like(gram)
        add_by_id(by_id, strips)
        assert_close(by_id, gram, atol=1e-10, rtol=0)


@given(seed=st.integers(0, 1000), ids=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=2))
def test_a_table_used_twice_adds_up_the_rows_of_an_id(seed, ids):
    """As with the embedding that an encoder and a decoder share, which a sequence may enter twice by one id."""
    generator = torch.Generator().manual_seed(seed)
    strips, total = [], torch.zeros(3, *SHAPE, dtype=torch.float64)
    for places in ids:
        own = torch.randn(3, len(places), SHAPE[1], generator=generator, dtype=torch.float64)
        part = SharedFactors(own=own, shared=torch.tensor(places), axis=1)
        strips.append(empty_strip(slice(0, 3), part))
        strips[-1].put(0, own)
        total += gradients(part)
    gram = torch.zeros(3, 3, dtype=torch.float64)
    add_by_id(gram, strips)
    assert_close(gram, total.flatten(1) @ total.flatten(1).T, atol=1e-10, rtol=0)


def test_rows_that_were_never_put_count_as_zero():
    """An expert's places differ from chunk to chunk: a strip then holds some rows of its sequence only."""
    whole = factors("linear", 1, rows=4)
    strips = []
    for put in (0, 2):
        strip = empty_strip(slice(0, 4), whole)
        strip.own.fill_(torch.nan)
        strip.put(put, whole.own[put : put + 2])
        strips.append(strip)
    gram = torch.zeros(4, 4, dtype=torch.float64)
    add_strips(gram, strips)
    assert_close(gram, cross_gram(whole, whole), atol=1e-11, rtol=0)


@given(places=st.integers(1, 40), chunk_size=st.integers(1, 40))
def test_what_strips_hold_is_counted_by_segments(places, chunk_size):
    own = torch.zeros(places, places, 1)
    strip = empty_strip(slice(0, places), SharedFactors(own=own, shared=torch.zeros(places, 2), axis=0))
    strip.own.fill_(torch.nan)
    for start in range(0, places, chunk_size):
        stop = min(start + chunk_size, places)
        strip.put(start, own[start:stop, :stop])
    tally = Tally(num_tokens=places, num_sequences=1, num_slots=places, itemsize=4)
    share = strip_share(tally, places, causal=True, chunk_size=chunk_size)
    assert share * places**2 == pytest.approx(int(strip.own.isfinite().sum()))
    assert strip_share(tally, places, causal=False) * places == strip.own.shape[2]
    assert strip_share(tally, 0, causal=True) == 0  # an expert that got no token


@pytest.mark.parametrize(("places", "held"), [(30, 30), (31, 32), (32, 32), (62, 64)])
def test_places_that_complete_a_segment_change_nothing(places, held):
    strips, formed = [], []
    for seed in range(2):
        whole = factors("linear", seed, rows=4, places=places)
        strips.append(empty_strip(slice(4 * seed, 4 * seed + 4), whole))
        assert strips[-1].own.shape[2] == held
        strips[-1].own.fill_(torch.nan)
        for row, reach in enumerate((3, places // 2, places - 1, places)):
            own = whole.own[row : row + 1, :reach]
            strips[-1].put(row, own)
            formed.append(gradients(SharedFactors(own=own, shared=whole.shared, axis=0)).flatten(1))
    gram, matrix = torch.zeros(8, 8, dtype=torch.float64), torch.cat(formed)
    add_strips(gram, strips)
    assert_close(gram, matrix @ matrix.T, atol=1e-9, rtol=0)


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0)])
def test_points_of_one_use_may_lie_along_either_axis(axes):
    """Where one sequence multiplies by a square weight, and another by what it is transposed."""
    generator, holder, formed = torch.Generator().manual_seed(0), Holder(2), []
    none = torch.zeros(1, 1, dtype=torch.long)
    stack = Stack(members=(0,), batch={}, rows=none, position=none, entry=none)
    for row, axis in enumerate(axes):
        own, shared = (torch.randn(1, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        part = PointFactors(own=own, shared=shared, axis=axis)
        holder.put(Piece(name="w", use=0, rows=torch.tensor([row]), part=part), stack)
        formed.append(form_gradients(part, (4, 4)).flatten(1))
    gram, matrix = torch.zeros(2, 2, dtype=torch.float64), torch.cat(formed)
    holder.add_to(gram)
    assert_close(gram, matrix @ matrix.T, atol=1e-12, rtol=0)


@given(
    kind=st.sampled_from(["linear", "conv1d", "embedding"]),
    count=st.integers(1, 4),
    rows=st.integers(1, 4),
    places=st.integers(1, 5),
    at_once=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_strips_of_one_shape_have_one_gram_however_they_are_multiplied(kind, count, rows, places, at_once, seed):
    parts = [factors(kind, seed + number, rows=rows, places=places) for number in range(count)]
    strips = [whole_strip(slice(rows * number, rows * (number + 1)), part) for number, part in enumerate(parts)]
    gram, formed = torch.zeros(count * rows, count * rows, dtype=torch.float64), torch.cat([*map(gradients, parts)])
    with divided_as(replace(CPU, call=CPU.call * at_once)):
        assert strips_module.small_alike(strips, torch.float64) == (at_once and count > 1)
        add_strips(gram, strips)
    assert_close(gram, formed.flatten(1) @ formed.flatten(1).T, atol=1e-10, rtol=0)


def test_strips_of_different_shapes_are_not_multiplied_at_once():
    def made(*sizes: tuple[int, int], start: int = 0) -> list[Strip]:
        ends = [start, *(start + sum(rows for rows, _ in sizes[: n + 1]) for n in range(len(sizes)))]
        parts = [factors("linear", n, rows=rows, places=places) for n, (rows, places) in enumerate(sizes)]
        return [whole_strip(slice(ends[n], ends[n + 1]), part) for n, part in enumerate(parts)]

    assert strips_module.small_alike(made((3, 4), (3, 4)), torch.float64)
    assert not strips_module.small_alike(made((3, 4), (2, 4)), torch.float64)
    assert not strips_module.small_alike(made((3, 4), (3, 5)), torch.float64)
    assert not strips_module.small_alike(made((3, 4)) + made((3, 4), start=4), torch.float64)  # a row between them
    assert not strips_module.small_alike(2 * made((3, 4)), torch.float64)  # two uses of one sequence
    assert not strips_module.small_alike(made((3, 4), (3, 4)), torch.bfloat16)


def test_formed_rows_of_one_label_are_one_product():
    generator, rows = torch.Generator().manual_seed(0), torch.tensor([2, 0, 1])
    parts = {name: torch.randn(3, size, generator=generator) for name, size in (("a", 2), ("b", 4), ("c", 3), ("d", 2))}
    holders = {name: Holder(3) for name in parts}
    for name, part in parts.items():
        holders[name].put(Piece(name=name, use=0, rows=rows, part=part), None)
    holders["d"].put(Piece(name="d", use=1, rows=rows[:1], part=parts["d"][:1]), None)
    label = {"a": "x", "b": "x", "c": "y", "d": "x"}.__getitem__
    left = joined(holders, label)
    assert {label(name) for name in left} == {"x", "y"} and len(left) == 3  # "d" has two pieces
    grams = {name: torch.zeros(3, 3, dtype=torch.float64) for name in ("x", "y")}
    for name, holder in left.items():
        holder.add_to(grams[label(name)])
    parts["d"] = parts["d"].index_add(0, torch.tensor([0]), parts["d"][:1])
    for name, gram in grams.items():
        there = torch.cat([part for one, part in parts.items() if label(one) == name], dim=1)[[1, 2, 0]].double()
        assert_close(gram, there @ there.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("call", [0.0, CPU.call])
@pytest.mark.parametrize("rows", [9, 10, 15, 16, 17])
def test_columns_that_complete_a_tile_change_nothing(rows, call):
    with divided_as(replace(CPU, call=call)):
        generator = torch.Generator().manual_seed(rows)
        strips, gradient = [], []
        for number in range(3):
            own = torch.randn(rows, 4, SHAPE[0], generator=generator, dtype=torch.float64)
            part = SharedFactors(own=own, shared=torch.randn(4, SHAPE[1], generator=generator, dtype=own.dtype), axis=0)
            strips.append(empty_strip(slice(number * rows, (number + 1) * rows), part))
            strips[-1].put(0, own)
            gradient.append(gradients(part).flatten(1))
        gram, formed = torch.zeros(3 * rows, 3 * rows, dtype=torch.float64), torch.cat(gradient)
        add_strips(gram, strips)
    assert_close(gram, formed @ formed.T, atol=1e-10, rtol=0)
