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


def side_by_side(tasks: Sequence[Callable[[Tensor], Tensor]], *, space: Callable[[], Tensor]) -> Iterator[Tensor]:
    """The results of the tasks, in their order; on a CPU as many run at a time as torch has threads, one thread each.

    The number of threads that torch uses elsewhere stays what it was; while the results are taken it is one. Tasks that
    are small run one after another.

    Args:
        tasks: Independent of each other; each is given a tensor to write to.
        space: Makes such a tensor, for those that run one after another; not in their thread, of which the C library
            keeps more of what is let go.
    """
    before = torch.get_num_threads()
    count, first = min(before, len(tasks)), space()
    if first.device.type != "cpu" or count < 2 or len(tasks) * first.numel() < WORTHWHILE:
        yield from (task(first) for task in tasks)
        return
    spaces: SimpleQueue[Tensor] = SimpleQueue()
    for one in (first, *(space() for _ in range(count - 1))):
        spaces.put(one)

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
