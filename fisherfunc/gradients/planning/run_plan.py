"""The plan of a run, whatever its route, as one record: what is passed, in which order, at which cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fisherfunc.gradients.dense.slabs import DensePlan
from fisherfunc.gradients.factored.estimate import Cost
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.workload import Workload

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
        passes_from_cuts: How many of these start where the one before them ended, not at the losses.
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
        needed_tokens: {number: {"sample", "population"}}: how many tokens it takes, where an earlier result told.
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
    passes_from_cuts: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    num_targets: int = 1
    needed_tokens: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)

    @property
    def num_passes(self) -> int:
        """How often all rows are passed over."""
        return len(self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        shown = {name: _plain(cost) for name, cost in self.parameters.items()}
        return {
            **{key: value for key, value in vars(self).items() if not isinstance(value, Mapping | tuple)},
            "num_passes": self.num_passes,
            "groups": [list(group) for group in self.groups],
            "parameters": shown,
            "operations": dict(self.operations),
            "seconds": dict(self.seconds) or None,
            "rates": dict(self.rates) or None,
            "needed_tokens": {name: dict(found) for name, found in self.needed_tokens.items()} or None,
        }


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
        passes_from_cuts=plan.passes_from_cuts,
        num_targets=work.tokens.num_targets,
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
