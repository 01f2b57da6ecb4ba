"""Tasks side by side: the results of one after another, each in memory of its own, and threads as they were."""

from collections.abc import Iterator
from functools import partial
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fisherfunc.linalg import threads
from fisherfunc.linalg.factors import SharedFactors
from fisherfunc.linalg.strips import Strip, add_strips, empty_strip
from fisherfunc.linalg.threads import side_by_side


@pytest.fixture
def three() -> Iterator[None]:
    """Three threads; the other tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def strips_of(count: int) -> list[Strip]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        own, shared = (torch.randn(*shape, generator=generator) for shape in ((5, 6, 4), (6, 3)))
        part = SharedFactors(own=own, shared=shared, axis=0)
        found.append(empty_strip(slice(5 * number, 5 * number + 5), part))
        found[-1].put(0, own)
    return found


def test_strips_have_the_same_gram_side_by_side(three, monkeypatch):
    strips, found = strips_of(7), []
    for worthwhile in (2**60, 0):
        monkeypatch.setattr(threads, "WORTHWHILE", worthwhile)
        found.append(torch.zeros(35, 35, dtype=torch.float64))
        add_strips(found[-1], strips)
    assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert bool((found[0].abs() > 1e-3).all())


def test_tasks_that_run_at_once_write_to_memory_of_their_own(three, monkeypatch):
    monkeypatch.setattr(threads, "WORTHWHILE", 0)
    together = Barrier(3, timeout=60)

    def task(number: int, space: Tensor) -> Tensor:
        assert torch.get_num_threads() == 1
        space.fill_(number)
        together.wait()  # all three have written
        return space.clone()

    found = list(side_by_side([partial(task, number) for number in range(6)], space=lambda: torch.empty(2)))
    assert [one.tolist() for one in found] == [[number, number] for number in range(6)]
    assert torch.get_num_threads() == 3


def test_threads_are_what_they_were_after_a_failure(three, monkeypatch):
    monkeypatch.setattr(threads, "WORTHWHILE", 0)

    def fails(space: Tensor) -> Tensor:
        raise KeyError("fails")

    with pytest.raises(KeyError, match="fails"):
        list(side_by_side([fails, fails], space=lambda: torch.empty(2)))
    assert torch.get_num_threads() == 3


def test_small_tasks_run_one_after_another_in_the_same_memory(three):
    spaces = []

    def space() -> Tensor:
        spaces.append(torch.empty(2))
        return spaces[-1]

    found = list(side_by_side([lambda mine: mine.fill_(1).clone()] * 3, space=space))
    assert len(found) == 3 and len(spaces) == 1
