"""Tasks side by side: the results of one after another, each in memory of its own, and threads as they were."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from fisherfunc.linalg.factors.factors import SharedFactors
from fisherfunc.linalg.factors.strips import Strip, add_strips, empty_strip
from fisherfunc.runtime import threads
from fisherfunc.runtime.grain import CPU, divided_as
from fisherfunc.runtime.threads import Workspace, side_by_side


@pytest.fixture
def three() -> Iterator[None]:
    """Three threads; the other tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def small() -> dict[str, Any]:
    """What tasks of two entries ask for."""
    return {"size": 2, "like": torch.empty(0), "workspace": Workspace()}


def strips_of(count: int) -> list[Strip]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        own, shared = (torch.randn(*shape, generator=generator) for shape in ((5, 6, 4), (6, 3)))
        part = SharedFactors(own=own, shared=shared, axis=0)
        found.append(empty_strip(slice(5 * number, 5 * number + 5), part))
        found[-1].put(0, own)
    return found


def exact_gram(strips: list[Strip], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ_st (δ_ns · δ_mt)(a_s · a_t) in float64, token by token, of changed factors."""
    parts = [part for strip in strips for _, part in strip.factors()]
    rows = torch.cat([torch.einsum("nso,si->noi", change(part.own), change(part.shared)) for part in parts]).flatten(1)
    return rows @ rows.T


def test_strips_have_the_same_gram_side_by_side(three, monkeypatch):
    strips, found = strips_of(7), []
    for worthwhile in (2**60, 0):
        monkeypatch.setattr(threads, "WORTHWHILE", worthwhile)
        found.append(torch.zeros(35, 35, dtype=torch.float64))
        with divided_as(replace(CPU, call=0.0)):  # pair by pair
            add_strips(found[-1], strips)
    exact, sizes = (exact_gram(strips, change) for change in (Tensor.double, lambda x: x.double().abs()))
    # Sums of 3 and 6 products, then of 6 · 4, in float32: each of 33 terms is rounded at most 33 times on its way.
    bound = 33 * torch.finfo(torch.float32).eps / 2 * sizes
    for gram in found:
        assert bool(((gram - exact).abs() <= bound).all())
    assert bool((exact.abs() > bound).all())  # nothing that is left out would pass


def test_tasks_that_run_at_once_write_to_memory_of_their_own(three, monkeypatch):
    monkeypatch.setattr(threads, "WORTHWHILE", 0)
    together = Barrier(3, timeout=60)

    def task(number: int, space: Tensor) -> Tensor:
        assert torch.get_num_threads() == 1
        space.fill_(number)
        together.wait()  # all three have written
        return space.clone()

    found = list(side_by_side([partial(task, number) for number in range(6)], **small()))
    assert [one.tolist() for one in found] == [[number, number] for number in range(6)]
    assert torch.get_num_threads() == 3


def test_threads_are_what_they_were_after_a_failure(three, monkeypatch):
    monkeypatch.setattr(threads, "WORTHWHILE", 0)

    def fails(space: Tensor) -> Tensor:
        raise KeyError("fails")

    with pytest.raises(KeyError, match="fails"):
        list(side_by_side([fails, fails], **small()))
    assert torch.get_num_threads() == 3


def test_small_tasks_run_one_after_another_in_the_same_memory(three):
    found = list(side_by_side([lambda mine: mine] * 3, **small()))
    assert len({mine.data_ptr() for mine in found}) == 1


def test_a_workspace_gives_the_same_memory_again_where_it_fits():
    workspace, like = Workspace(), torch.empty(0)
    first = workspace.pieces(2, 5, like)
    assert len({piece.data_ptr() for piece in first}) == 2
    for count, size in ((2, 5), (1, 5), (2, 3)):
        again = workspace.pieces(count, size, like)
        assert [piece.data_ptr() for piece in again] == [piece.data_ptr() for piece in first[:count]]
    for count, size, other in ((3, 5, like), (2, 6, like), (2, 5, like.double())):
        found = workspace.pieces(count, size, other)
        assert len(found) == count and all(len(p) >= size and p.dtype == other.dtype for p in found)
