"""The plan of a factored pass: what is exploited, what runs together, and what it needs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from fisherfunc.gradients.capture.calls import ModuleCall, outline_of
from fisherfunc.gradients.capture.probe import is_causal, probe
from fisherfunc.gradients.capture.rules import Shift
from fisherfunc.gradients.capture.segments import WHOLE, Segments, segments_of
from fisherfunc.gradients.capture.structure import (
    EXPLOITS,
    Structure,
    Traced,
    head_of,
    refusing,
    trace,
    vectors,
)
from fisherfunc.gradients.checks.ordinary import check_bytes
from fisherfunc.gradients.dense.slabs import DensePlan
from fisherfunc.gradients.factored.divide import Division, Needs, divided, from_the_losses
from fisherfunc.gradients.factored.estimate import Cost, costs, spans_of
from fisherfunc.gradients.factored.groups import Group
from fisherfunc.gradients.factored.loads import (
    Tally,
    carried_bytes,
    formed_cheaper,
    graph_bytes,
    hardly_shorter,
    held_bytes,
    slot_bytes,
    tally_of,
)
from fisherfunc.gradients.factors.pieces import num_places
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.runtime.memory import SavedBytes

LIBRARIES = 2**26
"""Bytes that libraries of matrix products keep for themselves, measured; for a small model what it saves, if less."""
PARTS = 8
"""A group holds at most this part of all factors, or as much as all Grams take, or little (runtime/grain.py)."""


@dataclass(frozen=True, kw_only=True)
class FactoredPlan:
    """How a factored pass is done.

    Attributes:
        structure: What is exploited, and which parameters are formed and why.
        chunk_size: Slots a batched backward pass.
        width: The most sequences that run together.
        segments: How the model is divided.
        groups: What each pass over all tokens is for.
        costs: What each parameter takes, and why that way.
        slabbed: Parameters too large for the memory limit: the dense route takes them, slab by slab.
        peak_bytes: The estimated peak beyond the model itself.
        slabs: The passes of the dense route over the slabbed parameters, once planned.
    """

    structure: Structure
    chunk_size: int
    width: int
    segments: Segments
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
    def num_segments(self) -> int:
        """How many segments run one after another, each from the cotangents that those above it left."""
        return len({group.start for group in self.groups})

    @property
    def exploited(self) -> tuple[str, ...]:
        """What the pass would be right without."""
        used = (self.segments.ends, self.structure.stacked, self.structure.causal)
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
    if known or options.refused:
        with SavedBytes() as saved:  # of one pass: memory of others is used again
            traced = trace(work, work.longest, structure, leaves=structure.dense, note=True)
    like = next(iter(work.params.values()))
    tally = tally_of(work)
    limit = options.limit(like.device)
    num_grams = len(set(options.labels.values()) if options.labels else work.params)
    gram = tally.num_tokens**2 * options.gram_dtype.itemsize
    beside = (num_grams + 1) * gram + min(LIBRARIES, limit // 8, saved.total)
    needs_of = partial(_needs, work, options, traced, saved, tally, max(limit - beside, 0), gram)
    if structure.head is not None and not structure.causal and "prefixes" not in structure.refused:
        _, on_prefixes = needs_of(replace(structure, causal=True))
        structure = _with_prefixes(work, structure, traced, from_the_losses(on_prefixes), tally)
    structure, needs = needs_of(structure)
    held = dict(needs.held)
    found = from_the_losses(needs)
    seen = options.checked or not work.loss.each_alone  # that samples meet: the check sees it, or the survey
    if found.width > 1 and seen and not known and not structure.dense and "stacks" not in structure.refused:
        structure = replace(structure, stacked=True)
    if not structure.stacked:
        needs = replace(needs, stacked=False)
        found = from_the_losses(needs)
    most = max(sum(held.values()) // PARTS, num_grams * gram, tally.grain.little)
    segments = _segments(traced, structure, held, min(most, needs.room // 2)) if structure.divisible else WHOLE
    if segments.ends:
        carried = carried_bytes(traced, structure, work.num_params, tally, held)
        segments = replace(segments, carried={n: c for n, c in carried.items() if _once_at_the_top(n, segments)})
        needs = replace(
            needs,
            slot=cache(partial(_slot_bytes, traced, structure, saved.largest, segments)),
            graph=cache(partial(_graph_bytes, traced, structure, saved, segments)),
        )
        found = divided(needs, segments, found, most)
    spans = spans_of(work.tokens, found.chunk_size, causal=structure.causal)
    return FactoredPlan(
        structure=structure,
        chunk_size=found.chunk_size,
        width=found.width,
        segments=found.segments,
        groups=found.groups,
        costs=costs(traced, structure, work.num_params, tally, spans=spans, held=held, slabbed=found.slabbed),
        slabbed=found.slabbed,
        peak_bytes=max(beside + found.num_bytes, check_bytes(work.params, limit) + 2 * saved.total),
    )


def _needs(
    work: Workload,
    options: PassOptions,
    traced: Traced,
    saved: SavedBytes,
    tally: Tally,
    room: int,
    gram: int,
    structure: Structure,
) -> tuple[Structure, Needs]:
    """The structure with what is cheaper formed, and what a pass then needs, undivided."""
    cheaper = frozenset(formed_cheaper(traced, structure, work.num_params, tally))
    structure = replace(structure, compact=cheaper & structure.factored)
    held = held_bytes(traced, structure, work.num_params, tally)
    return structure, Needs(
        room=room,
        graph=cache(partial(_graph_bytes, traced, structure, saved, WHOLE)),
        slot=cache(partial(_slot_bytes, traced, structure, saved.largest, WHOLE)),
        held={name: held[name] for name in work.params if name in held},
        tally=tally,
        places=max((num_places(u, 1) for u in traced.recording.uses if not isinstance(u.role, Shift)), default=1),
        causal=structure.causal,
        chunk_size=options.chunk_size,
        gram=gram,
    )


def _with_prefixes(work: Workload, structure: Structure, traced: Traced, found: Division, tally: Tally) -> Structure:
    """The structure with what is known of prefixes, where a division for them leaves any that are shorter."""
    source = vectors(head_of(traced.recording, structure))
    if source.ndim != 3:
        return structure
    if found.chunk_size >= tally.num_slots and len(found.groups) == 1 and not found.slabbed:
        sequence, position = work.tokens.sequence, work.tokens.position
        last = torch.cat([sequence.diff() != 0, sequence.new_ones(1, dtype=torch.bool)])
        if bool(hardly_shorter(position[last] + 1, source.shape[1]).all()):
            return refusing(structure, {"prefixes": "a pass takes all tokens of a sequence at once"})
    return replace(structure, causal=is_causal(work, structure, traced))


def _slot_bytes(
    traced: Traced, structure: Structure, saved_largest: int, segments: Segments, group: Group | None
) -> int:
    """What a batched backward pass holds for one slot of one sequence, of all parameters or of a group."""
    if group is None:
        return slot_bytes(traced, structure, saved_largest)
    items = group.items
    return slot_bytes(traced, structure, saved_largest, takes=lambda *use: (use[0], segments.of.get(use, 0)) in items)


def _graph_bytes(
    traced: Traced, structure: Structure, saved: SavedBytes, segments: Segments, group: Group | None
) -> int:
    """What the forward passes for a group hold: of all that is saved, the part that is made in its segments."""
    if group is None:
        return graph_bytes(traced, structure, saved.total)
    last = max(segment for _, segment in group.items)
    part = sum(segments.made.get(segment, 0.0) for segment in range(group.start, last + 1))
    here = int((2 if structure.causal else 1) * part * saved.total) + 2 * saved.largest
    if group.start:
        return here
    return max(here + graph_bytes(traced, structure, 0), saved.total)  # a whole pass records what calls return


def _segments(traced: Traced, structure: Structure, held: Mapping[str, int], most: int) -> Segments:
    """How the model is divided below the output layer, or below the losses where there is none.

    Args:
        traced: A pass over the longest sequence.
        structure: What is exploited.
        held: {name: bytes until its Gram is made}.
        most: Calls that hold more bytes are opened.
    """
    end, places, before = traced.losses, None, len(traced.recording.uses)
    if structure.head is not None:
        head = head_of(traced.recording, structure)
        end, before = vectors(head), next(i for i, use in enumerate(traced.recording.uses) if use is head)
        places = end.shape[1] if structure.causal else None
    if not end.requires_grad:
        return WHOLE
    counts = Counter(use.name for use in traced.recording.uses)

    def held_in(call: ModuleCall) -> int:
        return int(sum(held.get(name, 0) * uses / counts[name] for name, uses in call.uses.items()))

    outline = outline_of(traced.recording.modules, held_in, most, places)
    return segments_of(end, traced.recording, outline, before=before, leaves=traced.leaves)


def _once_at_the_top(name: str, segments: Segments) -> bool:
    return sum(segment == 0 for (used, _), segment in segments.of.items() if used == name) == 1
