"""Ranks that are killed at random moments: `python -m benchmarks.chaos [--times 50] [--ranks 2] [--timeout 15]`.

Each time some ranks start a spectrum with a checkpoint, one of them is killed after a random part of what a run takes,
and the others must end by themselves within a stated time, with one error that names it; or all had ended before. Then
the same ranks go on from the checkpoint, and must come to the eigenvalues of a run that nobody disturbed.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

import fisherfunc as ff


def main() -> None:
    """Kill, go on, compare; raise where something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timeout", type=float, default=15.0, help="seconds, of the ranks; more where the machine is busy"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(Path(options.one), options.timeout)
        return
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        begin = monotonic()
        want = _undisturbed(Path(folder, "whole"), options.ranks, options.timeout)
        whole, counts = monotonic() - begin, {"killed": 0, "ended before": 0}
        for number in range(options.times):
            here = Path(folder, str(number))
            victim, after = generator.randrange(options.ranks), whole * generator.random()
            kind = _disturbed(here, options.ranks, victim, after, options.timeout)
            counts[kind] += 1
            found = _undisturbed(here, options.ranks, options.timeout)
            off = float((found - want).abs().max() / want.max())
            if not off < 1e-12:
                raise AssertionError(f"time {number}: eigenvalues differ by {off:.1e} of the largest")
            print(f"{number + 1}/{options.times}: {kind}; gone on to the same eigenvalues", flush=True)
    print(f"{counts['killed']} times a rank was killed, {counts['ended before']} times all had ended before")


def _started(folder: Path, size: int, timeout: float) -> list[subprocess.Popen[str]]:
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.chaos", "--one", str(folder), "--timeout", str(timeout)]
    return [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]


def _undisturbed(folder: Path, size: int, timeout: float) -> torch.Tensor:
    """The eigenvalues that rank 0 writes."""
    for process in _started(folder, size, timeout):
        told = process.communicate(timeout=80 * timeout)[1]
        if process.returncode:
            raise AssertionError(f"a run that nobody disturbed failed: {told}")
    found: torch.Tensor = torch.load(folder / "eigenvalues.pt")
    (folder / "eigenvalues.pt").unlink()
    return found


def _disturbed(folder: Path, size: int, victim: int, after: float, timeout: float) -> str:
    """Kill a rank after some seconds, and hold the others to ending by themselves."""
    limit = 4 * timeout  # those that are left end within twice the ranks' own, and what ending a process takes
    processes = _started(folder, size, timeout)
    sleep(after)
    ended = processes[victim].poll() is not None
    processes[victim].send_signal(signal.SIGKILL)
    begin = monotonic()
    try:
        for rank, process in enumerate(processes):
            told = process.communicate(timeout=max(1.0, limit - (monotonic() - begin)))[1]
            if rank != victim and not ended and process.returncode and "RanksError" not in told:
                raise AssertionError(f"rank {rank} ended with something else: {told}")
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"a rank did not end within {limit:g} s") from error
    finally:
        for process in processes:
            process.kill()
    return "ended before" if ended else "killed"


def _one(folder: Path, timeout: float) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5)).double()
    batch = (torch.randn(200, 8).double(), torch.randint(5, (200,)))
    ranks = ff.distributed.ranks(timeout=timeout)
    options: dict[str, Any] = {"loss": ff.losses.classification(), "checkpoint": folder / "checkpoint"}
    result = ff.fisher_spectrum(model, batch, ranks=ranks, memory_limit=2_000_000, chunk_size=4, **options)
    if ranks.rank == 0:
        torch.save(result.full.eigenvalues, folder / "eigenvalues.pt")


if __name__ == "__main__":
    main()
