"""Measured quantities against targets: ratios within one run, the fraction of the floor, deviations of spectra."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.workloads import BFLOAT16, FASTEST

AT_LEAST = ("speed", "floor")


def outcomes(workload: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, Any]:
    """The workload with the floor's seconds, and with the measured value and the verdict of each target.

    Args:
        workload: With measurements and targets.
        rates: Operations a second of matrix products, by dtype.
    """
    if "reason" in workload:  # nothing ran
        return dict(workload)
    floor_s = workload["floor_operations"]["total"] / rates["float32"]
    targets = []
    for target in workload["targets"]:
        value, reference, reason = _value(target, workload["measurements"], floor_s)
        met = None if value is None else _met(target, value)
        at_floor = None if value is None else _at_floor(target, value, workload, rates)
        found = {"reference": reference, "measured": value, "met": met, "reason": reason, "at_floor": at_floor}
        targets.append({**target, **found})
    return {**workload, "floor_seconds": floor_s, "targets": targets}


def _at_floor(
    target: Mapping[str, Any], value: float, workload: Mapping[str, Any], rates: Mapping[str, float]
) -> float | None:
    """What a ratio of speeds would be if ours took the floor's operations at the rate of large matrix products."""
    if target["quantity"] != "speed":
        return None
    ours = next(found for found in workload["measurements"] if found["label"] == target["ours"])
    rate = rates["bfloat16" if target["ours"] == BFLOAT16 else "float32"]
    return value * ours["seconds"] / (workload["floor_operations"]["total"] / rate)


def seconds_a_row(found: Mapping[str, Any]) -> float | None:
    """None where no time counts."""
    return None if found["seconds"] is None else found["seconds"] / found["num_rows"]


def _met(target: Mapping[str, Any], value: float) -> bool:
    return value >= target["bound"] if target["quantity"] in AT_LEAST else value <= target["bound"]


def _value(
    target: Mapping[str, Any], measured: Sequence[Mapping[str, Any]], floor_s: float
) -> tuple[float | None, str | None, str | None]:
    """The value, the label that it is relative to, and why there is no value."""
    by_label = {found["label"]: found for found in measured}
    ours, reference = by_label.get(target["ours"]), target["reference"]
    if reference == FASTEST:
        others = [found for found in measured if found is not ours and found["seconds"] is not None]
        reference = (
            min(others, key=lambda found: found["seconds"] / found["num_rows"])["label"] if others else reference
        )
    for label in filter(None, (target["ours"], reference)):
        if label not in by_label:
            return None, reference, f"{label} did not run"
        if by_label[label]["seconds"] is None:
            return None, reference, f"{label} has no time"
    assert ours is not None  # the loop above returned
    other = by_label[reference] if reference is not None else ours
    match target["quantity"]:
        case "speed":
            return (seconds_a_row(other) or 0.0) / (seconds_a_row(ours) or math.inf), reference, None
        case "memory":
            return ours["peak_bytes"] / max(1, other["peak_bytes"]), reference, None
        case "peak":
            return float(ours["peak_bytes"]), reference, None
        case "floor":
            return floor_s / ours["seconds"], reference, None
        case "deviation":
            return deviation(ours["spectra"], other["spectra"]), reference, None
    raise ValueError(f"quantity expected speed, memory, peak, floor or deviation, got {target['quantity']!r}")


def deviation(ours: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest relative deviation of a leading eigenvalue or a trace, over blocks."""
    found = []
    for label, want in other.items():
        pairs = zip([*ours[label]["leading"], ours[label]["trace"]], [*want["leading"], want["trace"]], strict=True)
        found += [abs(got / true - 1) for got, true in pairs if true > 0]
    return max(found)
