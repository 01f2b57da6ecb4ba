"""A fresh process for each measurement, and the memory of this one.

A process is forked from a server, itself started anew, that has imported torch and the package but computed nothing
(starting Python anew for each would take longer than a quick run); so its peak of memory and its threads are its own.
"""

import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fisherfunc.runtime.memory import give_back

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class DiedError(Exception):
    """A process ended without a result; the message says how."""


def in_fresh_process(function: Callable[..., Any], *args: Any, limit_s: float) -> Any:
    """`function(*args)` in a process of its own.

    Args:
        function: At the top level of a module.
        args: What it takes.
        limit_s: After which the process is ended.

    Raises:
        DiedError: If it took too long, was killed or raised.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["benchmarks.preload"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            raise DiedError(f"ended after {limit_s:.0f} s")
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise DiedError(f"the process died with code {process.exitcode} (-9: out of memory)") from None
    finally:
        process.terminate()
        process.join()
        receiver.close()
    if kind == "raised":
        raise DiedError(value)
    return value


def _send(sender: Any, function: Callable[..., Any], args: tuple) -> None:
    sys.modules.setdefault("torchvision", None)  # see preload.py
    try:
        outcome = ("returned", function(*args))
    except Exception as error:  # the boundary of the process: told to the parent, which puts it into the table
        outcome = ("raised", f"{type(error).__name__}: {error}")
    sender.send(outcome)


def settled_memory(device: torch.device) -> int:
    """Bytes in use once what is free was given back; the peak is reset to it, where the system can.

    Args:
        device: Resident memory on a CPU; on a GPU, what torch has allocated there.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back()
    if sys.platform == "linux":
        try:
            _CLEAR.write_text("5")
        except OSError:
            return peak_memory(device)  # the peak so far stays, and counts as the base
        return _status("VmRSS")
    return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The peak of these bytes, since it was reset where the system can."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
