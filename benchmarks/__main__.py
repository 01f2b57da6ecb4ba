"""`python -m benchmarks [--quick] [--only NAME...] [--contenders NAME...] [--device D] [--out DIR] [--list]`.

Writes results.json (everything, raw), results.md (the tables) and, where the sweeps ran, benchmarks.png and .svg.
"""

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.contenders import TITLES
from benchmarks.plot import plot
from benchmarks.run import run
from benchmarks.table import markdown
from benchmarks.workloads import WORKLOADS

SCALING = "scaling"


def parser() -> argparse.ArgumentParser:
    """The options."""
    names = [workload.name for workload in WORKLOADS]
    found = argparse.ArgumentParser(prog="python -m benchmarks", description="fisherfunc against its neighbours.")
    found.add_argument("--quick", action="store_true", help="small sizes: under two minutes on two cores")
    found.add_argument("--only", nargs="+", choices=[*names, SCALING], metavar="NAME", help="workloads; see --list")
    found.add_argument("--contenders", nargs="+", choices=list(TITLES), metavar="NAME", help="who runs; see --list")
    found.add_argument("--device", default="cpu", help="where models and data lie: cpu, cuda, cuda:1 …")
    found.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder for the results")
    found.add_argument("--list", action="store_true", help="show workloads and contenders, and run nothing")
    return found


def listing(size: str) -> str:
    """Workloads with their sizes, and contenders."""
    lines = ["workloads:"]
    for workload in WORKLOADS:
        sizes = ", ".join(f"{key} {value}" for key, value in workload.sizes[size].items())
        lines += [f"  {workload.name}: {workload.title}", f"    {size}: {workload.task}, {sizes}"]
    lines += [f"  {SCALING}: time and memory against N and P, for the plot", "contenders:"]
    return "\n".join(lines + [f"  {name}: {title}" for name, title in TITLES.items()])


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    options = parser().parse_args(arguments)
    size = "quick" if options.quick else "full"
    if options.list:
        print(listing(size))
        return
    begin = perf_counter()

    def say(text: str) -> None:
        print(f"[{perf_counter() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    def save(results: dict[str, Any]) -> None:
        (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (options.out / "results.md").write_text(markdown(results), encoding="utf-8")

    options.out.mkdir(parents=True, exist_ok=True)
    picked = [workload for workload in WORKLOADS if options.only is None or workload.name in options.only]
    scaling = options.only is None or SCALING in options.only
    results = run(
        picked, size, contenders=options.contenders, scaling=scaling, device=options.device, say=say, save=save
    )
    if scaling:
        plot(results, options.out)
    print(markdown(results))
    say(f"written to {options.out}")


if __name__ == "__main__":
    main()
