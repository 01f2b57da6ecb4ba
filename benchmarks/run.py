"""From workloads to results: the oracle of each, then every contender in a fresh process, then the targets."""

import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import floor_operations
from benchmarks.gemm import gemm_rates
from benchmarks.measure import CANNOT, Measurement, Repeats, measure, write_oracle
from benchmarks.oracle import sampled_rows
from benchmarks.process import DiedError, in_fresh_process
from benchmarks.scaling import scale
from benchmarks.targets import outcomes
from benchmarks.tasks import Described, build
from benchmarks.workloads import Entry, Workload

Say = Callable[[str], None]

REPEATS = {"quick": Repeats(most=2, budget_s=0.5), "full": Repeats(most=5, budget_s=20.0)}
LIMIT_S = {"quick": 45.0, "full": 3600.0}
GEMM: dict[str, dict[str, Any]] = {"quick": {"size": 1024, "seconds": 0.3}, "full": {"size": 2048, "seconds": 2.0}}
PACKAGES = (
    "fisherfunc",
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "scikit-learn",
    "curvlinops-for-pytorch",
    "nngeometry",
    "backpack-for-pytorch",
    "vivit-for-pytorch",
    "neural-tangents",
    "jax",
)


def run(
    workloads: Sequence[Workload],
    size: str,
    *,
    contenders: Sequence[str] | None,
    scaling: bool,
    device: str,
    say: Say,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Everything that the table and the plot are made of, as plain Python values.

    Args:
        workloads: Which.
        size: "quick" or "full".
        contenders: Names of those that run; all where None.
        scaling: Whether to run the sweeps over N and P as well.
        device: Where models and data lie.
        say: Told what is under way.
        save: Given the results so far, after each workload.
    """
    say("GEMM rates")
    rates = [in_fresh_process(_gemm, size, device, limit_s=LIMIT_S[size])]
    found: list[dict[str, Any]] = []
    facts = {"size": size, "machine": machine(device), "versions": versions()}

    def so_far(swept: list[dict[str, Any]]) -> dict[str, Any]:
        best = {name: max(rate[name] for rate in rates) for name in rates[0]}  # the machine at its best, in this run
        done = [outcomes(workload, best) for workload in found]
        return {**facts, "gemm_rates": best, "all_gemm_rates": rates, "workloads": done, "scaling": swept}

    with tempfile.TemporaryDirectory() as folder:
        for workload in workloads:
            found.append(_workload(workload, size, contenders, device, Path(folder), say))
            save(so_far([]))
        swept = scale(size, contenders, device, LIMIT_S[size], Path(folder), say) if scaling else []
    rates.append(in_fresh_process(_gemm, size, device, limit_s=LIMIT_S[size]))
    results = so_far(swept)
    save(results)
    return results


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on besides the versions."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Package → version, None where it is not installed."""
    return {name: next(_version(name), None) for name in PACKAGES}


def _version(name: str) -> Iterator[str]:
    try:
        yield metadata.version(name)
    except metadata.PackageNotFoundError:
        return


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _gemm(size: str, device: str) -> dict[str, float]:
    return gemm_rates(**GEMM[size], device=device)


def _facts(task: Described) -> dict[str, Any]:
    built = build(*task)
    return {
        "num_rows": built.num_rows,
        "rows_a_sequence": built.rows_a_sequence,
        "num_params": built.num_params,
        "floor_operations": floor_operations(built),
    }


def _workload(
    workload: Workload, size: str, contenders: Sequence[str] | None, device: str, folder: Path, say: Say
) -> dict[str, Any]:
    say(f"{workload.name}: the oracle")
    task, count, limit = (workload.task, workload.sizes[size], device), workload.sample[size], LIMIT_S[size]
    truth = folder / f"{workload.name}.pt"
    about = {"name": workload.name, "title": workload.title, "task": workload.task, "sizes": task[1]}
    try:
        facts = in_fresh_process(_facts, task, limit_s=limit)
        in_fresh_process(write_oracle, task, count, str(truth), limit_s=limit)
    except DiedError as error:
        return {**about, "reason": str(error), "measurements": [], "targets": []}
    rows = sampled_rows(facts["num_rows"], facts["rows_a_sequence"], count)
    measured = []
    for entry in workload.entries[size]:
        if contenders is None or entry.name in contenders:
            say(f"{workload.name}: {entry.label}")
            found = _measured(entry, task, rows, facts["rows_a_sequence"], REPEATS[size], str(truth), limit)
            measured.append(found.to_dict())
    truth.unlink()
    targets = [vars(target).copy() for target in workload.targets[size]]
    return {**about, **facts, "oracle_rows": len(rows), "measurements": measured, "targets": targets}


def _measured(
    entry: Entry,
    task: Described,
    rows: tuple[int, ...],
    rows_a_sequence: int,
    repeats: Repeats,
    truth: str,
    limit: float,
) -> Measurement:
    options = entry.options
    if entry.tokens is not None:
        options = replace(options, rows=tuple(row for row in rows if row < rows_a_sequence)[: entry.tokens])
    call = (entry.label, entry.name, task, options, repeats, truth, entry.tolerance)
    try:
        return Measurement(**in_fresh_process(measure, *call, limit_s=limit))
    except DiedError as error:
        return Measurement(label=entry.label, status=CANNOT, reason=str(error))
