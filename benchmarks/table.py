"""Results as Markdown: the targets, then one table a workload, with the reason wherever there is no time."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.targets import seconds_a_row
from benchmarks.workloads import OURS

DASH = "–"
_MIB = 2**20
_QUANTITIES = {
    "speed": "times as fast",
    "memory": "of its memory",
    "peak": "peak memory",
    "floor": "of the floor's rate",
    "deviation": "largest deviation",
}


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    parts = [f"# Benchmarks ({results['size']} sizes)", _setting(results)]
    if results["workloads"]:
        parts.append(_targets(results["workloads"], results["size"], held=results["machine"]["gpu"] is None))
    parts += [_workload(workload, results["size"]) for workload in results["workloads"]]
    if results["scaling"]:
        parts.append(_scaling(results["scaling"]))
    return "\n\n".join(parts) + "\n"


def _setting(results: Mapping[str, Any]) -> str:
    machine, rates = results["machine"], results["gemm_rates"]
    installed = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    missing = [name for name, version in results["versions"].items() if not version]
    return "\n".join(
        [
            f"{described(machine)}. Matrix products in this run: "
            + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates.items())
            + ".",
            "",
            f"{installed}" + (f"; not installed: {', '.join(missing)}" if missing else "") + ".",
            "",
            "Seconds are the least of the repetitions, after a warm-up; memory is the peak beyond the loaded model "
            f"({'resident' if machine['gpu'] is None else 'allocated on the GPU'}), each contender in a process of its "
            "own. Before a time counts, the contender's eigenvalues are compared with those of a loop of backward "
            "passes in float64; `error` is the largest difference, relative to the largest eigenvalue.",
        ]
    )


def described(machine: Mapping[str, Any]) -> str:
    """What the numbers depend on, in one line."""
    gpu = "" if machine["gpu"] is None else f"{machine['gpu']}; "
    return gpu + (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; Python {machine['python']}"
    )


def _targets(workloads: Sequence[Mapping[str, Any]], size: str, *, held: bool) -> str:
    """Measured quantities; beside the targets where these are held to them."""
    rows = []
    for workload in workloads:
        for target in workload["targets"]:
            bound = _amount(target["quantity"], target["bound"])
            sign = "≥" if target["quantity"] in ("speed", "floor") else "≤"
            measured = (
                target["reason"] if target["measured"] is None else _amount(target["quantity"], target["measured"])
            )
            verdict = {True: "met", False: "not met", None: DASH}[target["met"]]
            who = "" if target["ours"] == OURS else f"{target['ours']}: "
            against = f" {target['reference']}" if target["reference"] else ""
            quantity = f"{who}{_QUANTITIES[target['quantity']]}{_joined(target['quantity'], against)}"
            most = target["at_floor"]
            at_floor = "" if most is None else _amount(target["quantity"], most)
            cells = [f"{sign} {bound}" if held else DASH, measured, at_floor, verdict if held else DASH]
            rows.append([workload["name"], quantity, *cells])
    head = ["workload", "quantity", "target", "measured", "at the floor", ""]
    note = "The targets are those of the full sizes on two cores"
    note += "; these sizes are smaller, and fixed costs weigh more." if size == "quick" else "."
    note += (
        " At the floor: what the ratio would be if fisherfunc took no operation but the floor's, at the rate of large "
        "matrix products in this run."
    )
    return f"## Targets\n\n{grid(head, rows, '---:')}\n\n{note}"


def _joined(quantity: str, against: str) -> str:
    words = {"speed": " as", "memory": ":", "deviation": " from"}
    return words.get(quantity, "") + against if against else ""


def _amount(quantity: str, value: float) -> str:
    match quantity:
        case "speed":
            return f"{value:.3g} ×"
        case "peak":
            return f"{value / 1e9:.2f} GB"
        case "deviation":
            return f"{100 * value:.2g} %"
    return f"{value:.2f}" if quantity == "floor" else f"{value:.3f}"


def _workload(workload: Mapping[str, Any], size: str) -> str:
    measured = workload["measurements"]
    if "reason" in workload:
        return f"## {workload['title']}\n\nDid not run: {workload['reason']}"
    ours = next((found for found in measured if found["label"].startswith(OURS)), None)
    floor = workload["floor_operations"]
    facts = (
        f"N = {workload['num_rows']:,}, P = {workload['num_params']:,}; floor {floor['total'] / 1e12:.3g} TFLOP "
        f"({floor['backward'] / 1e12:.3g} backward, {floor['contraction'] / 1e12:.3g} contraction), "
        f"{in_seconds(workload['floor_seconds'])} s in float32. The oracle has {workload['oracle_rows']:,} rows."
    )
    if size == "quick":
        facts = "Here: " + ", ".join(f"{key} {value}" for key, value in workload["sizes"].items()) + f". {facts}"
    head = ["contender", "gives", "rows", "seconds", "s a row", "of ours", "peak MiB", "error", "checked"]
    rows = [_row(found, ours, workload["num_rows"]) for found in measured]
    reasons = [f"- {found['label']}: {_reason(found)}" for found in measured if found["seconds"] is None]
    lines = [f"## {workload['title']}", "", facts, "", grid(head, rows, "---:")]
    return "\n".join(lines + (["", *reasons] if reasons else []))


def _row(found: Mapping[str, Any], ours: Mapping[str, Any] | None, num_rows: int) -> list[str]:
    if found["seconds"] is None:
        what = "wrong eigenvalues" if found["status"] == "wrong" else "cannot"
        error = "" if found["error"] is None else f"{found['error']:.1e}"
        return [found["label"], found["gives"], "", what, "", "", "", error, found["compared"]]
    each = seconds_a_row(found) or 0.0
    base = seconds_a_row(ours) if ours else None
    part = "" if found["num_rows"] == num_rows else " (a part)"
    return [
        found["label"],
        found["gives"],
        f"{found['num_rows']:,}{part}",
        in_seconds(found["seconds"]),
        in_seconds(each),
        f"{each / base:.2f}" if base else "",
        f"{found['peak_bytes'] / _MIB:,.0f}",
        "" if found["error"] is None else f"{found['error']:.1e}",
        found["compared"],
    ]


def _reason(found: Mapping[str, Any]) -> str:
    said = " ".join(str(found["reason"]).split())
    said = said if len(said) <= 300 else f"{said[:297]}…"
    return f"no time, for its eigenvalues are wrong: {said}" if found["status"] == "wrong" else said


def _scaling(series: Sequence[Mapping[str, Any]]) -> str:
    head = ["sweep", "contender", "N", "P", "seconds", "floor's TFLOP", "peak MiB", "error"]
    rows = []
    for one in series:
        for point in one["points"]:
            missing = point["seconds"] is None
            rows.append(
                [
                    "N" if one["axis"] == "num_rows" else "P",
                    one["contender"],
                    f"{point['num_rows']:,}",
                    f"{point['num_params']:,}",
                    point["status"] if missing else in_seconds(point["seconds"]),
                    f"{point['floor_operations'] / 1e12:.3g}",
                    "" if missing else f"{point['peak_bytes'] / _MIB:,.0f}",
                    "" if point["error"] is None else f"{point['error']:.1e}",
                ]
            )
    reasons = [f"- {one['contender']}: {one['reason']}" for one in series if one["reason"]]
    note = "Grams alone. Contenders that hold all rows stop where memory would."
    return "\n".join([f"## Against N and against P\n\n{note}\n", grid(head, rows, "---:"), *reasons])


def in_seconds(value: float) -> str:
    """Three digits, or two of very little."""
    return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table; columns whose entries begin with digits throughout, but for dashes, are aligned right."""
    columns = [[row[i] for row in rows if row[i] not in ("", DASH)] for i in range(len(head))]
    numeric = [bool(column) and all(cell[0].isdigit() for cell in column) for column in columns]
    rule = [align if right else "---" for right in numeric]
    lines = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
