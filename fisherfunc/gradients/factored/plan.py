"""The plan of a factored pass: what is exploited, what runs together, and what it needs."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

from fisherfunc.gradients.certificate import check_bytes
from fisherfunc.gradients.dense.slabs import DensePlan
from fisherfunc.gradients.factored.calls import Call
from fisherfunc.gradients.factored.cuts import Levels, levels_of
from fisherfunc.gradients.factored.divide import Needs, from_cuts, from_the_losses
from fisherfunc.gradients.factored.estimate import Cost, costs, spans_of
from fisherfunc.gradients.factored.groups import Group, Taken, leg_of
from fisherfunc.gradients.factored.loads import (
    carried_bytes,
    formed_cheaper,
    graph_bytes,
    held_bytes,
    slot_bytes,
    tally_of,
)
from fisherfunc.gradients.factored.pieces import num_places
from fisherfunc.gradients.factored.probe import probe
from fisherfunc.gradients.factored.rules import Shift
from fisherfunc.gradients.factored.skips import ModuleCall, skippable
from fisherfunc.gradients.factored.structure import (
    EXPLOITS,
    Structure,
    Traced,
    apart,
    head_of,
    refusing,
    trace,
    vectors,
)
from fisherfunc.gradients.memory import SavedBytes
from fisherfunc.gradients.workload import PassOptions, Workload

LIBRARIES = 2**26
"""Bytes that libraries of matrix products keep for themselves, measured; for a small model what it saves, if less."""


@dataclass(frozen=True, kw_only=True)
class FactoredPlan:
    """How a factored pass is done.

    Attributes:
        structure: What is exploited, and which parameters are formed and why.
        chunk_size: Slots a batched backward pass.
        width: The most sequences that run together.
        levels: How the model is cut, where several groups start at cuts.
        groups: What each pass over all tokens is for.
        costs: What each parameter takes, and why that way.
        slabbed: Parameters too large for the memory limit: the dense route takes them, slab by slab.
        peak_bytes: The estimated peak beyond the model itself.
        slabs: The passes of the dense route over the slabbed parameters, once planned.
    """

    structure: Structure
    chunk_size: int
    width: int
    levels: Levels
    groups: tuple[Group, ...]
    costs: Mapping[str, Cost]
    slabbed: tuple[str, ...]
    peak_bytes: int
    slabs: DensePlan | None = None

    @property
    def num_passes(self) -> int:
        """How often all rows are passed over."""
        return len(self.groups) + (0 if self.slabs is None else len(self.slabs.slabs))

    @property
    def passes_from_cuts(self) -> int:
        """How many passes start where the one before them ended."""
        return sum(group.start > 0 for group in self.groups)

    @property
    def exploited(self) -> tuple[str, ...]:
        """What the pass would be right without."""
        used = (self.levels.cuts, self.structure.shortcuts, self.structure.stacked, self.structure.causal)
        return tuple(name for name, use in zip(EXPLOITS, used, strict=True) if use)

    @property
    def formed(self) -> dict[str, str]:
        """{parameter: why its gradients are formed}."""
        return self.structure.dense | dict.fromkeys(sorted(self.structure.compact), "cheaper formed than factored")


def plan_factored(work: Workload, options: PassOptions, *, structure: Structure | None = None) -> FactoredPlan:
    """Choose what is formed and what is passed together.

    Args:
        work: What to pass over.
        options: How.
        structure: What is known of the model; found by a probe on the longest sequence where None.
    """
    known = structure is not None
    if structure is None:
        structure, traced, saved = probe(work)
        structure = refusing(structure, options.refused)
    structure = replace(structure, tested=not options.checked)
    if known or options.refused:
        with SavedBytes() as saved:  # of one pass: memory of others is used again
            traced = trace(work, work.longest, structure, leaves=structure.dense, note=True)
    like = next(iter(work.params.values()))
    tally = tally_of(work)
    structure = replace(
        structure, compact=frozenset(formed_cheaper(traced, structure, work.num_params, tally)) & structure.factored
    )
    limit = options.limit(like.device)
    num_grams = len(set(options.labels.values()) if options.labels else work.params)
    gram = tally.num_tokens**2 * options.gram_dtype.itemsize
    beside = (num_grams + 1) * gram + min(LIBRARIES, limit // 8, saved.total)
    held = held_bytes(traced, structure, work.num_params, tally, spilled=options.empty is not None)
    needs = Needs(
        room=max(limit - beside, 0),
        graph=cache(partial(_leg_bytes, traced, structure, saved, Levels())),
        slot=cache(partial(_slot_bytes, traced, structure, saved.largest)),
        held={name: held[name] for name in work.params if name in held},
        tally=tally,
        places=max((num_places(u, 1) for u in traced.recording.uses if not isinstance(u.role, Shift)), default=1),
        causal=structure.causal,
        chunk_size=options.chunk_size,
        gram=gram,
    )
    found = from_the_losses(needs)
    if found.width > 1 and not known and not structure.dense and "stacks" not in structure.refused:
        structure = replace(structure, stacked=True)
    if not structure.stacked:
        needs = replace(needs, stacked=False)
        found = from_the_losses(needs)
    if len(found.groups) > 1 and structure.cuttable:
        levels = _levels(traced, structure)
        carried = carried_bytes(traced, structure, work.num_params, tally, held)
        levels = replace(levels, carried={n: size for n, size in carried.items() if _once_at_the_top(n, levels)})
        needs = replace(
            needs,
            slot=cache(partial(_slot_bytes, traced, structure, saved.largest, levels)),
            graph=cache(partial(_leg_bytes, traced, structure, saved, levels)),
        )
        found = from_cuts(needs, levels, found) or found
    spans = spans_of(work.tokens, found.chunk_size, causal=structure.causal)
    floors = {leg_of(found.groups, number, found.levels).floor for number in range(len(found.groups))}
    return FactoredPlan(
        structure=structure,
        chunk_size=found.chunk_size,
        width=found.width,
        levels=replace(found.levels, skipped=_skipped(traced, floors)),
        groups=found.groups,
        costs=costs(traced, structure, work.num_params, tally, spans=spans, held=held, slabbed=found.slabbed),
        slabbed=found.slabbed,
        peak_bytes=max(beside + found.num_bytes, check_bytes(work.params, limit) + 2 * saved.total),
    )


def _slot_bytes(
    traced: Traced, structure: Structure, saved_largest: int, levels: Levels | None = None, group: Group | None = None
) -> int:
    """What a batched backward pass holds for one slot of one sequence, of all parameters or of a group."""
    if group is None:
        return slot_bytes(traced, structure, saved_largest)
    taken = Taken(group=group, levels=levels or Levels())
    return slot_bytes(traced, structure, saved_largest, takes=taken.takes)


def _leg_bytes(traced: Traced, structure: Structure, saved: SavedBytes, levels: Levels, group: Group | None) -> int:
    """What the forward passes hold on the leg of a group: of all that is saved, the part that is made on its levels."""
    if group is None:
        return graph_bytes(traced, structure, saved.total)
    last = max(level for _, level in group.items) + 1  # the one above the next group's is on this leg too
    here = [group.start <= levels.of.get(made.call[:2], 0) <= last for made in traced.recording.made.values()]
    sizes = [made.num_bytes for made in traced.recording.made.values()]
    part = sum(size for size, on_leg in zip(sizes, here, strict=True) if on_leg) / max(sum(sizes), 1)
    leg = int((2 if structure.causal else 1) * part * saved.total) + 2 * saved.largest
    if group.start:
        return leg
    return max(leg + graph_bytes(traced, structure, 0), saved.total)  # a whole pass finds what is known of a stack


def _levels(traced: Traced, structure: Structure) -> Levels:
    """How the model is cut below the output layer, or below the losses where there is none."""
    at_head, below = apart(traced.recording, structure)
    end, places = traced.losses, None
    if structure.head is not None:
        end = vectors(head_of(traced.recording, structure))
        places = end.shape[1] if structure.causal else None
    if not end.requires_grad:
        return Levels()
    targets = {(use.name, use.number): use.output for use in below}
    targets |= {(name, -1): leaf for name, leaf in traced.leaves.items()}
    found = levels_of(end, traced.recording.made, targets, places=places)
    return replace(found, of={**found.of, **{(use.name, use.number): 0 for use in at_head}})


def _skipped(traced: Traced, floors: Container[Call | None]) -> dict[Call, tuple[ModuleCall, ...]]:
    """The modules that need not be called where one of these cuts is known."""
    cuts = [made for made in traced.recording.made.values() if made.call in floors]
    return {cut.call: tuple(skippable(traced.recording.modules, cut)) for cut in cuts}


def _once_at_the_top(name: str, levels: Levels) -> bool:
    return sum(level == 0 for (used, _), level in levels.of.items() if used == name) == 1
