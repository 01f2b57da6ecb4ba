"""The check of a run over ranks: each holds its own rows against ordinary backward passes, and all of them together.

For weights u of all rows, uᵀ K u = ‖Σ_r g_r‖² with g_r = ∇ Σ uₙ ℓₙ over the rows of rank r: one sum over ranks of a
gradient, and the Gram of the rows of different ranks is seen by it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.checks.certificate import Certificate, certify, draws
from fisherfunc.gradients.checks.ordinary import kept, parts, room
from fisherfunc.gradients.rows.subsample import EVERY, Coordinates
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.grams.divided import DividedGram, products


class Across:
    """What the check of one rank asks of the others.

    Args:
        grams: Divided ones.
    """

    def __init__(self, grams: Mapping[str, DividedGram]) -> None:
        self._grams = list(grams.values())
        self._everyone = self._grams[0].everyone

    def gradient(self, tree: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum over ranks of gradients; they are written to."""
        return {name: self._everyone.summed(f"gradients of {name}", value) for name, value in tree.items()}

    def sums(self, traces: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums like Σ uₙ² Kₙₙ, and uᵀ K u, over the rows of all ranks, for the weights of those here."""
        return self._everyone.summed("traces", traces), products(self._grams, weights)


def certify_over_ranks(
    grams: Mapping[str, Any], work: Workload, *, limit: int, labels: Mapping[str, str] | None = None, **how: Any
) -> Certificate:
    """Hold divided Grams against ordinary backward passes; see `certify`. Every rank gets the same.

    Args:
        grams: By parameter or label.
        work: All rows.
        limit: In bytes; see `certify`.
        labels: See `certify`.
        **how: See `certify`.
    """
    first: DividedGram = next(iter(grams.values()))
    index, everyone = first.index, first.everyone
    across = Across(grams)
    own = {label: gram.rows[:, index] for label, gram in grams.items()}
    found = None
    if len(index):
        found = certify(own, work.select(index), limit=limit, labels=labels, across=across, **how)
    else:
        _take_part(own, work, across, limit, how.get("coordinates", EVERY))
    each = [one for one in everyone.gathered("the check", found) if one is not None]
    worst = max(each, key=lambda one: (one.difference != one.difference, one.difference))
    differences = {label: max(one.differences[label] for one in each) for label in grams}
    failing = frozenset(label for one in each for label in one.failing)
    return replace(worst, differences=differences, failing=failing)


def _take_part(
    grams: Mapping[str, Tensor], work: Workload, across: Across, limit: int, coordinates: Coordinates
) -> None:
    """What a rank without rows adds to the sums over ranks: nothing."""
    none = next(iter(grams.values())).new_zeros(0, dtype=torch.float64)
    for _ in range(draws(grams, work)):
        for names in parts(work.params, room(limit)):
            across.gradient({name: kept(torch.zeros_like(work.params[name]), name, coordinates) for name in names})
        across.sums(none.new_zeros(2, len(grams)), none)
