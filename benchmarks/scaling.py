"""Two sweeps of a causal language model: over the number N of tokens, and over the number P of parameters.

All points of a contender run in one process, the smallest first; memory's peak is reset before each (see process.py).
Contenders that hold all rows stop where these would take more than `ROWS_BYTES`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import TITLES
from benchmarks.contenders.common import Options
from benchmarks.floor import floor_operations
from benchmarks.measure import Repeats, measure_task, write_oracle
from benchmarks.process import DiedError, in_fresh_process
from benchmarks.tasks import Described, build

CONTENDERS = ("loop", "vmap", "ours")
ROWS_BYTES = {"quick": 10**9, "full": 6 * 10**9}
REPEATS = {"quick": Repeats(most=1), "full": Repeats(most=3, budget_s=10.0)}
SAMPLE = 8
_SHAPE = {"n_head": 4, "vocab_size": 1000, "n_positions": 64}
_N = {
    "quick": [{"n_layer": 2, "n_embd": 128, "positions": 32, "sequences": count} for count in (1, 2, 4)],
    "full": [{"n_layer": 4, "n_embd": 256, "positions": 64, "sequences": count} for count in (1, 2, 4, 8, 16)],
}
_P = {
    "quick": [{"n_layer": 2, "n_embd": width, "positions": 32, "sequences": 1} for width in (64, 128, 256)],
    "full": [{"n_layer": 4, "n_embd": width, "positions": 64, "sequences": 2} for width in (128, 256, 512, 1024)],
}
AXES = {"num_rows": _N, "num_params": _P}


def scale(
    size: str,
    contenders: Sequence[str] | None,
    device: str,
    limit_s: float,
    folder: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Both sweeps: `{"axis", "contender", "points", "reason"}` each.

    Args:
        size: "quick" or "full".
        contenders: Names of those that run; all where None.
        device: Where models and data lie.
        limit_s: For all points of one contender.
        folder: Where oracles go.
        say: Told what is under way.
    """
    found = []
    for axis, sizes in AXES.items():
        tasks: list[Described] = [("gpt2", {**_SHAPE, **point}, device) for point in sizes[size]]
        truths = [str(folder / f"{axis}-{place}.pt") for place in range(len(tasks))]
        say(f"sweep over {axis}: the oracles")
        in_fresh_process(_oracles, tasks, truths, limit_s=limit_s)
        for name in CONTENDERS:
            if contenders is not None and name not in contenders:
                continue
            say(f"sweep over {axis}: {TITLES[name]}")
            points, reason = [], None
            try:
                points = in_fresh_process(_sweep, name, tasks, truths, size, limit_s=limit_s)
            except DiedError as error:
                reason = str(error)
            found.append({"axis": axis, "contender": TITLES[name], "points": points, "reason": reason})
    return found


def _oracles(tasks: list[Described], paths: list[str]) -> None:
    for task, path in zip(tasks, paths, strict=True):
        write_oracle(task, SAMPLE, path)


def _sweep(name: str, tasks: list[Described], truths: list[str], size: str) -> list[dict[str, Any]]:
    points = []
    for described, truth in zip(tasks, truths, strict=True):
        task = build(*described)
        if name != "ours" and 4 * task.num_rows * task.num_params > ROWS_BYTES[size]:
            break
        found = measure_task(TITLES[name], name, task, Options(), REPEATS[size], truth)
        facts = {"num_params": task.num_params, "floor_operations": floor_operations(task)["total"]}
        points.append({**found.to_dict(), "num_rows": task.num_rows, **facts})
    return points
