"""The table of a plan, for a terminal: what each parameter takes and why that way, then passes, time and memory.

Parameters of one route, reason and size are one line: a model repeats its layers.
"""

import re
from collections import defaultdict
from typing import Any

from fisherfunc.gradients.planning.run_plan import RunPlan
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.reports.report import require_rich
from fisherfunc.surface.reports.tables import Column, Row, left_out_note, table
from fisherfunc.surface.wording import compact, count_of_units, matrix_name, model_name, tokens_lines, windows

STEPS = {
    "preparation": "preparation",
    "passes": "forward and backward",
    "contraction": "contraction",
    "eigensolve": "eigensolve",
}
COLUMNS = (
    Column("parameters", figures=False),
    Column("route", figures=False),
    Column("why", rank=1, figures=False),
    Column("entries", rank=2),
    Column("operations", rank=4),
    Column("memory", rank=3),
)
_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


def plan_report(plan: RunPlan, facts: Provenance, *, width: int = 120) -> Any:
    """The table with the figures below it, as something that a rich console prints.

    Args:
        plan: What to show.
        facts: What of its provenance a result would say.
        width: The columns of the terminal; columns that do not fit are left out.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    title = f"Plan for {model_name(facts) or 'a model'}: {matrix_name(facts)}"
    drawn, left_out = table(rich, COLUMNS, [Row(cells) for cells in _lines(plan)], width=width, title=title)
    lines = [*summary(plan, facts), *left_out_note(left_out, width)]
    return rich.console.Group(drawn, "", *(rich.text.Text(line) for line in lines))


def summary(plan: RunPlan, facts: Provenance) -> list[str]:
    """The figures of the whole run, a line each."""
    num_tokens = plan.num_units // plan.num_targets
    units = count_of_units(Provenance(num_tokens=num_tokens, num_rows=plan.num_units, unit=facts.unit))
    passes = "1 pass" if plan.num_passes == 1 else f"{plan.num_passes} passes"
    if plan.num_segments > 1:
        passes += f" down {plan.num_segments} segments of the model"
    within = "" if facts.unit == "sequence" else f" of {plan.num_sequences} sequence(s)"
    lines = [
        f"{units}{within}, {plan.num_params:,} parameters: {passes} by the {plan.route} route"
        + (f" ({plan.reason})" if plan.reason else ""),
        *windows(facts),
        f"Sequences run together: {plan.stack_width}; rows of each in a backward pass: {plan.chunk_size}",
        f"Peak memory beyond the model: {size(plan.peak_bytes)}, within a limit of {size(plan.memory_limit)}",
        "Operations: " + ", ".join(f"{step} {value:.2e}" for step, value in plan.operations.items()),
    ]
    if plan.needed_tokens:
        lines += tokens_lines(plan.needed_tokens)
    if plan.seconds:
        parts = ", ".join(f"{STEPS[step]} {value:.1f}" for step, value in plan.seconds.items() if step in STEPS)
        lines.append(f"Seconds: {plan.seconds['total']:.1f} ({parts})")
    if plan.over_ranks is not None:
        many = plan.over_ranks
        lines.append(
            f"On {many['num_ranks']} ranks, predicted: {many['seconds']['total']:.1f} s; of the rank with most to do, "
            f"peak {size(many['peak_bytes'])}, {size(many['bytes_sent'])} sent"
        )
    return lines


def size(count: int) -> str:
    """A number of bytes.

    Example:
        >>> size(1_500_000_000), size(2_000_000), size(999)
        ('1.5 GB', '2 MB', '999 B')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2g} {name}" if count < 10 * unit else f"{count / unit:,.0f} {name}"
    return f"{count} B"


def _lines(plan: RunPlan) -> list[tuple[str, ...]]:
    alike = defaultdict(list)
    for name, cost in plan.parameters.items():
        alike[_LAYER.sub("*", name), cost.route, cost.why].append(cost)
    found: list[tuple[str, ...]] = []
    for (name, route, why), some in alike.items():
        operations = sum(cost.forward + cost.backward + cost.contraction for cost in some)
        times = f" ({len(some)} times)" if len(some) > 1 else ""
        entries, held = sum(cost.num_params for cost in some), sum(cost.held_bytes for cost in some)
        found.append((name + times, route, why, compact(entries), f"{operations:.1e}", size(held)))
    return found
