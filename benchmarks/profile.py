"""Where the time of fisherfunc goes on the workloads: `python -m benchmarks.profile`, `--help` for options.

Each workload in a process of its own: a run on a few rows to load what is loaded once, then one run with its sections
timed (sections.py). Beside the seconds of a section stand those that the floor's operations in it would take at the
rate of large matrix products, measured in that process before and after the run. Writes profile.json and profile.md.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import ours
from benchmarks.contenders.common import Options
from benchmarks.floor import floor_parts
from benchmarks.gemm import gemm_rate
from benchmarks.process import DiedError, in_fresh_process, settled_memory
from benchmarks.run import GEMM, LIMIT_S, machine
from benchmarks.sections import FLOOR, SECTIONS, timed_by
from benchmarks.stopwatch import Stopwatch
from benchmarks.table import DASH, described, grid, in_seconds
from benchmarks.tasks import Described, build
from benchmarks.workloads import WORKLOADS, Entry, Workload
from fisherfunc.runtime.clock import clock

REST = "rest"
_NOTE = (
    "One run after a warm-up, each in a process of its own. Seconds are those in which a section itself was at work, "
    "not one inside it; sections stand in the order of a run. Floor: what the floor's operations of a section would "
    "take at the rate of large matrix products in that process."
)


def own_entries(workload: Workload, size: str) -> Iterator[Entry]:
    """The first entry of fisherfunc in each dtype.

    Args:
        workload: Whose entries.
        size: "quick" or "full".
    """
    dtypes = set()
    for entry in workload.entries[size]:
        if entry.name == "ours" and entry.options.dtype not in dtypes:
            dtypes.add(entry.options.dtype)
            yield entry


def profiled(task: Described, options: Options, size: str) -> dict[str, Any]:
    """Run a task in this process, and say how long each section took.

    Args:
        task: Its name, sizes and device.
        options: How to run.
        size: "quick" or "full": how long matrix products are timed.
    """
    built = build(*task)
    ours.prepare(built.small(), options).run()
    rate = partial(gemm_rate, getattr(torch, options.dtype), **GEMM[size], device=task[2])
    rates = [rate()]
    work, watch = ours.prepare(built, options), Stopwatch(partial(clock, built.device))
    settled_memory(built.device)  # as where contenders are measured
    with timed_by(watch):
        begin = clock(built.device)
        grams, _ = work.run()
        seconds = clock(built.device) - begin
    rates.append(rate())
    return {
        "num_rows": built.num_rows,
        "num_params": built.num_params,
        "how": {key: grams.metadata.get(key) for key in ("route", "passes", "chunk_size", "stack_width")},
        "seconds": seconds,
        "sections": by_title(watch.seconds, seconds),
        "dtype": options.dtype,
        "gemm_rate": max(rates),
        "all_gemm_rates": rates,
        "floor_operations": floor_parts(built),
    }


def by_title(seconds: Mapping[str, float], total: float) -> dict[str, float]:
    """Title → seconds, of all sections in the order of a run; at the end what none of them took."""
    found = {title: seconds.get(title, 0.0) for title in dict.fromkeys(section.title for section in SECTIONS)}
    return {**found, REST: total - sum(found.values())}


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row a section, and below it what is left of the floor's rate.

    Args:
        found: What `profiled` returned.
    """
    floor = {title: found["floor_operations"][part] / found["gemm_rate"] for title, part in FLOOR.items()}
    rows = []
    for title, seconds in found["sections"].items():
        least = in_seconds(floor[title]) if floor.get(title) else DASH
        rows.append([title, in_seconds(seconds), f"{100 * seconds / found['seconds']:.1f} %", least])
    total, rate = sum(floor.values()), f"{found['gemm_rate'] / 1e9:,.0f} GFLOP/s in {found['dtype']}"
    return (
        grid(["section", "seconds", "share", "floor seconds"], rows, "---:")
        + f"\n\nTotal {in_seconds(found['seconds'])} s; floor {in_seconds(total)} s at {rate}: "
        f"{total / found['seconds']:.2f} of the floor's rate."
    )


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [f"# Profile ({results['size']} sizes)", f"{described(results['machine'])}.", _NOTE]
    return "\n\n".join([*parts, *map(_profile, results["profiles"])]) + "\n"


def _profile(found: Mapping[str, Any]) -> str:
    head = f"## {found['name']}: {found['label']}"
    if "reason" in found:
        return f"{head}\n\nDid not run: {found['reason']}"
    sizes = ", ".join(f"{key} {value}" for key, value in found["sizes"].items())
    how = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["how"].items() if value is not None)
    facts = f"{found['task']}, {sizes}; N = {found['num_rows']:,}, P = {found['num_params']:,}; {how}."
    return f"{head}\n\n{facts}\n\n{table(found)}"


def profiles(workloads: Sequence[Workload], size: str, device: str) -> Iterator[dict[str, Any]]:
    """What is shown of each entry, or why there is nothing.

    Args:
        workloads: Which.
        size: "quick" or "full".
        device: Where models and data lie.
    """
    for workload in workloads:
        task = (workload.task, workload.sizes[size], device)
        for entry in own_entries(workload, size):
            about = {"name": workload.name, "label": entry.label, "task": task[0], "sizes": task[1]}
            try:
                found = in_fresh_process(profiled, task, entry.options, size, limit_s=LIMIT_S[size])
            except DiedError as error:
                found = {"reason": str(error)}
            yield {**about, **found}


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description="Where fisherfunc's time goes.")
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--quick", action="store_true", help="small sizes: under a minute on two cores")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", default="cpu", help="where models and data lie: cpu, cuda, cuda:1 …")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder for the results")
    options = parser.parse_args(arguments)
    size = "quick" if options.quick else "full"
    picked = [workload for workload in WORKLOADS if options.only is None or workload.name in options.only]
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"size": size, "machine": machine(options.device), "profiles": []}
    for found in profiles(picked, size, options.device):
        results["profiles"].append(found)
        (options.out / "profile.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (options.out / "profile.md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
