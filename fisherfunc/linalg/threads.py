"""Many small products side by side: a thread each, where the library's own threads have too little to share.

A product of some hundred rows is too small to be split between cores, so that two of them at a time take half as long
as one at a time with twice the threads (measured on 2 cores, 4 strips of a GPT-2: 9.8 s against 5).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def side_by_side(tasks: Sequence[Callable[[], Tensor]], *, device: torch.device) -> Iterator[Tensor]:
    """The results of the tasks, in their order; on a CPU as many run at a time as torch has threads, one thread each.

    The number of threads that torch uses elsewhere stays what it was; while the results are taken it is one.

    Args:
        tasks: Independent of each other.
        device: Where they run.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1 or len(tasks) < 2:
        yield from (task() for task in tasks)
        return
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            torch.set_num_threads(1)  # a team of threads would wait for the cores that the tasks run on
            yield from pool.map(lambda task: task(), tasks)
    finally:
        torch.set_num_threads(count)  # what threads that start later get
