"""The plan of a run, whatever its route, as one record: what is passed, in which order, at which cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fisherfunc.gradients.dense.slabs import DensePlan
from fisherfunc.gradients.factored.estimate import Cost
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.planning.made_for import MadeFor
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.records.sheet import Sheet, as_html, as_text, figure

SOLVER_MATRICES = 6
"""The N × N matrices of an eigensolve (of its block, in the solver's dtype, and the solver's own), or of estimates of
the population (5.7 of 3,200 tokens)."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run will do, and what it will take.

    Attributes:
        route: "factored" or "dense".
        reason: Why it is the dense one; None otherwise.
        num_units: The rows: N tokens, or sequences, of T targets each.
        num_sequences: How many sequences have a token.
        num_params: P.
        groups: The parameters of each pass over all rows; those of the dense route's slabs at the end.
        num_segments: How many parts of the model run one after another, each from where the one above it ended.
        chunk_size: Rows of a sequence in one batched backward pass.
        stack_width: The most sequences that run together.
        parameters: {name: route, reason, operations and bytes}.
        operations: "forward", "backward", "contraction", and "eigensolve" where spectra are part of the plan.
        memory_limit: In bytes, beyond the model.
        peak_bytes: The predicted peak beyond the model.
        seconds: "preparation", "passes" (forward and backward), "contraction", "eigensolve" and "total"; empty where
            nothing was calibrated.
        rates: What they were predicted from, in operations a second.
        num_targets: T.
        of_route: What the route itself goes by; None in a plan that was read.
        made_for: What it can be run for, by `fisher_spectrum(..., plan=)`; None in a plan that `ff.plan` did not make.
        needed_tokens: {number: {"sample", "population"}}: how many tokens it takes, where an earlier result told.
        over_ranks: Where ranks were asked for: "num_ranks", and of the rank that has most to do its "share" of the
            backward passes, "seconds", "peak_bytes", "bytes_sent", and the "rates" that these were predicted from.
    """

    route: str
    reason: str | None
    num_units: int
    num_sequences: int
    num_params: int
    groups: tuple[tuple[str, ...], ...]
    chunk_size: int
    stack_width: int
    parameters: Mapping[str, Cost]
    operations: Mapping[str, float]
    memory_limit: int
    peak_bytes: int
    num_segments: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    num_targets: int = 1
    of_route: FactoredPlan | DensePlan | None = field(default=None, repr=False)
    made_for: MadeFor | None = field(default=None, repr=False)
    needed_tokens: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    over_ranks: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        """Show it on one screen: a row per parameter."""
        return as_text(_sheet(self))

    def _repr_html_(self) -> str:
        """Show it in a notebook."""
        return as_html(_sheet(self))

    @property
    def num_passes(self) -> int:
        """How often all rows are passed over."""
        return len(self.groups)

    @property
    def given_up(self) -> dict[str, str]:
        """{exploit: why the factored route does without it}."""
        return dict(self.of_route.structure.refused) if isinstance(self.of_route, FactoredPlan) else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        shown = {name: _plain(cost) for name, cost in self.parameters.items()}
        plain = {key: value for key, value in vars(self).items() if key not in ("of_route", "made_for")}
        return {
            **{key: value for key, value in plain.items() if not isinstance(value, Mapping | tuple)},
            "num_passes": self.num_passes,
            "groups": [list(group) for group in self.groups],
            "parameters": shown,
            "operations": dict(self.operations),
            "seconds": dict(self.seconds) or None,
            "rates": dict(self.rates) or None,
            "over_ranks": None if self.over_ranks is None else dict(self.over_ranks),
            "needed_tokens": {name: dict(found) for name, found in self.needed_tokens.items()} or None,
        }


def _sheet(plan: RunPlan) -> Sheet:
    rows = [
        (name, cost.route, figure(cost.num_params), f"{cost.forward + cost.backward + cost.contraction:.1e}")
        for name, cost in plan.parameters.items()
    ]
    seconds = f", about {figure(plan.seconds['total'])} s" if plan.seconds else ""
    return Sheet(
        title=f"Plan: {plan.num_units} rows of {plan.num_sequences} sequences, {plan.num_params:,} parameters{seconds}",
        columns=("parameter", "route", "entries", "operations"),
        rows=rows,
        notes=[
            f"{plan.num_passes} pass(es) by the {plan.route} route" + (f" ({plan.reason})" if plan.reason else ""),
            f"peak {plan.peak_bytes / 1e6:,.0f} MB beyond the model, of {plan.memory_limit / 1e6:,.0f} MB allowed",
            "operations: " + ", ".join(f"{step} {count:.1e}" for step, count in plan.operations.items()),
        ],
    )


def factored_run(plan: FactoredPlan, work: Workload, *, memory_limit: int) -> RunPlan:
    """The plan of a factored pass."""
    groups = tuple(tuple(name for name in work.params if name in group.names) for group in plan.groups)
    return RunPlan(
        route="factored",
        reason=None,
        num_units=work.num_tokens,
        num_sequences=_num_sequences(work),
        num_params=sum(work.num_params.values()),
        groups=groups + (() if plan.slabs is None else _slab_names(plan.slabs)),
        chunk_size=plan.chunk_size,
        stack_width=plan.width,
        parameters=plan.costs,
        operations=_summed(plan.costs),
        memory_limit=memory_limit,
        peak_bytes=plan.peak_bytes,
        num_segments=plan.num_segments,
        num_targets=work.tokens.num_targets,
        of_route=plan,
    )


def dense_run(plan: DensePlan, work: Workload, *, reason: str, memory_limit: int) -> RunPlan:
    """The plan of a dense pass."""
    count = work.num_tokens
    num_sequences = _num_sequences(work)
    found = {
        name: Cost(
            route="dense",
            why=reason,
            num_params=size,
            held_bytes=count * size * work.params[name].element_size(),
            forward=2.0 * size * num_sequences,
            backward=4.0 * size * count,
            contraction=2.0 * count**2 * size,
        )
        for name, size in work.num_params.items()
    }
    return RunPlan(
        route="dense",
        reason=reason,
        num_units=count,
        num_sequences=num_sequences,
        num_params=sum(work.num_params.values()),
        groups=_slab_names(plan),
        chunk_size=plan.chunk_size,
        stack_width=1,
        parameters=found,
        operations=_summed(found),
        memory_limit=memory_limit,
        peak_bytes=plan.peak_bytes,
        num_targets=work.tokens.num_targets,
        of_route=plan,
    )


def with_eigensolve(plan: RunPlan, num_blocks: int, rate: float | None = None) -> RunPlan:
    """The plan with the eigenvalues of the blocks and, where there are several, of the full matrix: 4/3 N³ each.

    A solver holds some matrices beside the Grams.
    """
    operations = eigensolve_operations(plan.num_units, num_blocks)
    peak = max(plan.peak_bytes, solver_bytes(plan.num_units, num_blocks))
    plan = replace(plan, operations={**plan.operations, "eigensolve": operations}, peak_bytes=peak)
    return plan if rate is None else timed(plan, eigensolve=operations / rate)


def eigensolve_operations(num_units: int, num_blocks: int) -> float:
    """4/3 N³ a block, and as many for the full matrix where that is not the only block."""
    return (num_blocks + (num_blocks > 1)) * 4.0 / 3.0 * num_units**3


def solver_bytes(num_units: int, num_grams: int) -> int:
    """The Grams, and what an eigensolve holds beside them, in float64."""
    return (num_grams + SOLVER_MATRICES) * num_units**2 * 8


def timed(plan: RunPlan, **seconds: float) -> RunPlan:
    """The plan with more of its predicted seconds; the total follows."""
    parts = {name: value for name, value in plan.seconds.items() if name != "total"} | seconds
    return replace(plan, seconds={**parts, "total": sum(parts.values())})


def _plain(cost: Cost) -> dict[str, Any]:
    hidden = ("places", "features")
    return {key: value for key, value in asdict(cost).items() if key not in hidden}


def _summed(costs: Mapping[str, Cost]) -> dict[str, float]:
    return {key: sum(getattr(c, key) for c in costs.values()) for key in ("forward", "backward", "contraction")}


def _slab_names(plan: DensePlan) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(dict.fromkeys(columns.name for columns in slab)) for slab in plan.slabs)


def _num_sequences(work: Workload) -> int:
    return len(work.tokens.sequence.unique())
