"""What a planned run would take on several ranks: predicted from the plan of one process, and from rates.

With R ranks, N rows, B Grams and P parameters, the rank that has most to do
  passes over its share of the sequences, and contracts N/R rows against all others (of each pair of ranks one does);
  sends its factors to (R − 1)/2 others, (N/R)² numbers of each Gram to as many, its rows of every matrix to be solved
  to the rank that solves it, and once P numbers, for the check;
  solves its share of the matrices, the full one with what is estimated of the population.
What is done before the pass is done by every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from fisherfunc.gradients.planning.run_plan import SOLVER_MATRICES, RunPlan

ASSUMED = {"bytes": 1e9}
"""In bytes a second, where nobody says how fast ranks send: a network of ten gigabits."""
RATES = ("passes", "contraction", "eigensolve", "bytes")
OF_POPULATION = 3
"""What estimates of the population take, in eigensolves."""
ITEM = 8
"""Bytes of an entry of a Gram."""


@dataclass(frozen=True, kw_only=True)
class RanksPlan:
    """What the rank that has most to do would take; predicted, not measured.

    Attributes:
        num_ranks: R.
        share: Its part of all backward passes.
        seconds: Of "preparation", "passes", "contraction", "exchange", "eigensolve" those whose rate is known, and
            "total".
        peak_bytes: Beyond the model.
        bytes_sent: By it.
        rates: What was predicted from, in operations and bytes a second.
    """

    num_ranks: int
    share: float
    seconds: Mapping[str, float]
    peak_bytes: int
    bytes_sent: int
    rates: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {**vars(self), "seconds": dict(self.seconds), "rates": dict(self.rates)}


def check_rates(rates: Mapping[str, float] | None) -> None:
    """Raise where rates are none that a prediction takes.

    Raises:
        ValueError: If a name is unknown, or a rate not positive.
    """
    for name, rate in (rates or {}).items():
        if name not in RATES or not rate > 0:
            raise ValueError(f"rates expected positive numbers by the names {RATES}, got {name!r}: {rate!r}")


def over_ranks(
    plan: RunPlan, num_ranks: int, *, share: float, num_grams: int, rates: Mapping[str, float] | None = None
) -> RanksPlan:
    """Predict the same run on so many ranks.

    Args:
        plan: Of one process, with its eigensolves.
        num_ranks: R.
        share: The part of the backward passes that the busiest rank has.
        num_grams: How many Grams, one a block.
        rates: {"passes", "contraction", "eigensolve": operations a second; "bytes": bytes a second} of a rank; as the
            plan has measured them here where not given.

    Raises:
        ValueError: As `check_rates`.
    """
    check_rates(rates)
    known = _measured(plan) | ASSUMED | dict(rates or {})
    count, fraction = plan.num_units, 1 / num_ranks
    one_gram = ITEM * count**2
    num_matrices = num_grams + (num_grams > 1)
    solves = max(ceil((num_matrices + OF_POPULATION) * fraction), OF_POPULATION + 1)
    sent = (
        (num_ranks - 1)
        * fraction
        * (
            sum(cost.held_bytes for cost in plan.parameters.values()) / 2
            + num_grams * one_gram * fraction / 2
            + num_matrices * one_gram * fraction
            + 2 * 4 * plan.num_params
        )
    )
    operations = {
        "passes": (plan.operations["forward"] + plan.operations["backward"]) * share,
        "contraction": plan.operations["contraction"] * fraction,
        "eigensolve": solves * plan.operations["eigensolve"] / num_matrices,
    }
    seconds = {name: done / known[name] for name, done in operations.items() if name in known}
    seconds["exchange"] = sent / known["bytes"]
    if "preparation" in plan.seconds:
        seconds["preparation"] = plan.seconds["preparation"]
    grams = (num_grams + 1) * one_gram
    held = max(sum(plan.parameters[name].held_bytes for name in group) for group in plan.groups)
    visiting = 2 * max(cost.held_bytes for cost in plan.parameters.values())  # one that comes, and what is sent of one
    rest = max(plan.peak_bytes - grams - held, 0) + (held + (visiting if num_ranks > 1 else 0)) * fraction
    return RanksPlan(
        num_ranks=num_ranks,
        share=share,
        seconds={**seconds, "total": sum(seconds.values())},
        peak_bytes=int(grams * fraction + max(rest, SOLVER_MATRICES * one_gram)),
        bytes_sent=int(sent),
        rates={name: rate for name, rate in known.items() if name in RATES},
    )


def _measured(plan: RunPlan) -> dict[str, float]:
    """The rates that the predicted seconds of a plan come to."""
    operations = {**plan.operations, "passes": plan.operations["forward"] + plan.operations["backward"]}
    return {name: operations[name] / plan.seconds[name] for name in RATES if plan.seconds.get(name)}
