"""Ranks, each a fork of a server that has imported torch and the package: to import them takes each a few seconds."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "scipy.stats", "fisherfunc"])
WATCHDOG_S = 240


def ranks_started(main: Callable, *arguments: Any, size: int, started: int | None = None) -> list[int | None]:
    """The exit codes of `main(*arguments)` on ranks of a group of this size; only the first `started` are started.

    No agent ends them: each ends itself.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        SERVER.Process(target=_as_rank, args=({**group, "RANK": str(rank)}, main, arguments))
        for rank in range(size if started is None else started)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(WATCHDOG_S)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def _as_rank(environment: dict[str, str], main: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    main(*arguments)
