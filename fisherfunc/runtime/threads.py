"""Many small products side by side: a thread each, where the library's own threads have too little to share.

A product of some hundred rows is too small to be split between cores, so that two of them at a time take half as long
as one at a time with twice the threads (measured on 2 cores, 4 strips of a GPT-2: 9.8 s against 5).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

WORTHWHILE = 2**20
"""Entries that tasks write to for which threads are started: that takes about a millisecond."""


class Workspace:
    """Memory that tasks write to, a piece for each that runs at a time, kept for those of the next call.

    It is made in the thread that asks for it: of what others let go the C library keeps more.
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []

    def pieces(self, count: int, size: int, like: Tensor) -> list[Tensor]:
        """Tensors of at least `size` entries, of the dtype and on the device of `like`."""
        fitting = [p for p in self._pieces if len(p) >= size and p.dtype == like.dtype and p.device == like.device]
        if len(fitting) < count:
            fitting.clear()
            self._pieces.clear()  # gone before others are made
            self._pieces = fitting = [like.new_empty(size) for _ in range(count)]
        return fitting[:count]


def side_by_side(
    tasks: Sequence[Callable[[Tensor], Tensor]], *, size: int, like: Tensor, workspace: Workspace
) -> Iterator[Tensor]:
    """The results of the tasks, in their order; on a CPU as many run at a time as torch has threads, one thread each.

    The number of threads that torch uses elsewhere stays what it was; while the results are taken it is one. Tasks that
    are small run one after another.

    Args:
        tasks: Independent of each other; each is given a tensor to write to. The longest had better come first.
        size: How many entries of that tensor they use at most.
        like: What it is like.
        workspace: Where it comes from.
    """
    before = torch.get_num_threads()
    count = min(before, len(tasks))
    if like.device.type != "cpu" or count < 2 or len(tasks) * size < WORTHWHILE:
        (mine,) = workspace.pieces(1, size, like)
        yield from (task(mine) for task in tasks)
        return
    spaces: SimpleQueue[Tensor] = SimpleQueue()
    for piece in workspace.pieces(count, size, like):
        spaces.put(piece)

    def run(task: Callable[[Tensor], Tensor]) -> Tensor:
        mine = spaces.get()
        try:
            return task(mine)
        finally:
            spaces.put(mine)

    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            torch.set_num_threads(1)  # a team of threads would wait for the cores that the tasks run on
            yield from pool.map(run, tasks)
    finally:
        torch.set_num_threads(before)  # what threads that start later get
