"""How many kernels a run of fisherfunc dispatches, and where: `python -m benchmarks.kernels`, `--help` for options.

A kernel is an operation of torch that is no view. Unlike seconds, their number does not depend on the machine, and on a
GPU it is the time of small work. Each workload is divided as on a CPU, as on a GPU (runtime/grain.py), and as on a GPU
with a plan that was made before (`ff.plan`); all run on a CPU in one thread. A read is an operation that hands a value
to Python, for which a GPU has to finish all it was given.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import ours
from benchmarks.contenders.common import Options
from benchmarks.process import DiedError, in_fresh_process
from benchmarks.run import LIMIT_S
from benchmarks.sections import BEFORE, CHECK, CONTRACTION, METADATA, timed_by
from benchmarks.stopwatch import Stopwatch
from benchmarks.table import grid
from benchmarks.tasks import Described, Task, build
from benchmarks.workloads import WORKLOADS
from fisherfunc.runtime.grain import CPU, GPU, Grain, divided_as

GRAINS = {"CPU": CPU, "GPU": GPU}
PLANNED = "GPU, with a plan"
PARTS = ("before the pass", "pass", "contraction", "check", "rest")
MEMORY_LIMIT = 4 * 10**9
"""Of every run: what is free would make the numbers those of a machine."""
READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
SMALL = ("gpt2-small", "mlp", "mlp-classes", "cnn")
"""What runs where nothing is asked for: the work that is small, so that launches are its time."""


class Kernels(TorchDispatchMode):
    """Counts the operations that run inside it.

    Attributes:
        launched: Those that are no views.
        read: Those that hand a value to Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched = self.read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count it."""
        self.launched += not func.is_view
        self.read += func.overloadpacket in READS
        return func(*args, **(kwargs or {}))


def counted(task: Task, sizes: Grain, *, planned: bool = False) -> dict[str, dict[str, int]]:
    """Run a task in this thread, and return {"kernels" or "reads": {part of the run: how many}}.

    Args:
        task: What is run: Grams by layer.
        sizes: By which the pass is divided.
        planned: Whether the plan was made before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with divided_as(sizes):
            work = ours.prepare(task, Options(blocks="layer", memory_limit=MEMORY_LIMIT), planned=planned)
        with divided_as(sizes), Kernels() as kernels:
            launched, read = Stopwatch(lambda: kernels.launched), Stopwatch(lambda: kernels.read)
            with timed_by(launched), timed_by(read):
                work.run()
    finally:
        torch.set_num_threads(threads)
    totals = {"kernels": (launched, kernels.launched), "reads": (read, kernels.read)}
    return {what: by_part(watch.seconds, total) for what, (watch, total) in totals.items()}


def by_part(found: Mapping[str, float], total: int) -> dict[str, int]:
    """Part of a run → how many, from {title of a section: how many}.

    Args:
        found: By section.
        total: Of the whole run: what no section has is the rest.
    """
    parts = dict.fromkeys(PARTS, 0)
    names = dict.fromkeys(BEFORE, PARTS[0]) | {CONTRACTION: PARTS[2], CHECK: PARTS[3], METADATA: PARTS[4]}
    for title, count in found.items():
        parts[names.get(title, PARTS[1])] += int(count)
    parts[PARTS[4]] += total - sum(parts.values())
    return parts


def counted_as_described(task: Described, division: str) -> dict[str, dict[str, int]]:
    """The same of a task as a fresh process is told of it."""
    planned = division == PLANNED
    return counted(build(*task), GRAINS["GPU" if planned else division], planned=planned)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a workload and division.

    Args:
        found: {workload: {division: what `counted` returned, or why there is nothing}}.
    """
    rows = []
    for name, divisions in found.items():
        for division, counts in divisions.items():
            if "reason" in counts:
                rows.append([name, division, str(counts["reason"])] + [""] * (len(PARTS) + 1))
                continue
            kernels, reads = counts["kernels"], counts["reads"]
            figures = [*(kernels[part] for part in PARTS), sum(kernels.values()), sum(reads.values())]
            rows.append([name, division, *(f"{figure:,}" for figure in figures)])
    return grid(["workload", "divided as on a", *PARTS, "kernels", "reads"], rows, "---:")


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Kernels that a run dispatches.")
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--quick", action="store_true", help="small sizes: some ten seconds")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args(arguments)
    size = "quick" if options.quick else "full"
    found: dict[str, dict[str, Any]] = {}
    for workload in WORKLOADS:
        if workload.name in (options.only or SMALL):
            task = (workload.task, workload.sizes[size], "cpu")
            for division in (*GRAINS, PLANNED):
                try:
                    counts = in_fresh_process(counted_as_described, task, division, limit_s=LIMIT_S[size])
                except DiedError as error:
                    counts = {"reason": str(error)}
                found.setdefault(workload.name, {})[division] = counts
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
