"""What each parameter costs the factored route, in operations and bytes: the cost rule, the chunks, the groups.

For N tokens, n of them a sequence of S places: contracting a weight with d features along its own axis pairwise costs
N² S d (1 + S/n) operations, half of it for a causal model; formed gradients of p entries cost N² p, and 2 N S p to
form; points cost N² (d + e), embeddings at most N² S d. A rule per tensor decides, never a layer's type.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fisherfunc.gradients.capture.recording import Use
from fisherfunc.gradients.capture.rules import Convolution, Scale, Shift
from fisherfunc.gradients.capture.segments import Carried
from fisherfunc.gradients.capture.structure import Structure, Traced, apart
from fisherfunc.gradients.factors.pieces import factor_dtype, features_of, is_lookup, num_places
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.factors.strips import held_places
from fisherfunc.runtime.grain import CPU, Grain, grain_of

SLOWER = 2.0
"""How much slower an operation of a pairwise contraction is than one of a large matrix product."""
HARDLY = 16
"""A prefix that lacks less than this part of a sequence is not run by itself."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How much there is.

    Attributes:
        num_tokens: N.
        num_sequences: That have a token.
        num_slots: The most tokens of a sequence.
        itemsize: Of a gradient entry.
        grain: What suits the device.
    """

    num_tokens: int
    num_sequences: int
    num_slots: int
    itemsize: int
    grain: Grain = CPU

    @property
    def per_sequence(self) -> float:
        """Tokens a sequence, on average."""
        return self.num_tokens / self.num_sequences


def tally_of(work: Workload) -> Tally:
    """Count the tokens of a pass."""
    counts = work.tokens.sequence.bincount()
    return Tally(
        num_tokens=work.num_tokens,
        num_sequences=int((counts > 0).sum()),
        num_slots=int(counts.max()),
        itemsize=factor_dtype(next(iter(work.params.values())).dtype).itemsize,
        grain=grain_of(work.tokens.sequence.device),
    )


def formed_cheaper(traced: Traced, structure: Structure, num_params: Mapping[str, int], tally: Tally) -> list[str]:
    """The factored parameters whose gradients had better be formed."""
    _, uses = apart(traced.recording, structure)
    at_head = {structure.head[0]} if structure.head else set()
    pairwise: dict[str, float] = defaultdict(float)
    places: dict[str, int] = defaultdict(int)
    for use in uses:
        if not isinstance(use.role, Shift | Scale):
            pairwise[use.name] += _pairwise(use, num_params[use.name], tally, causal=structure.causal)
            places[use.name] += num_places(use, 1)
    return [
        name
        for name, cost in pairwise.items()
        if name not in at_head and _formed(num_params[name], places[name], tally, causal=structure.causal) < cost
    ]


def _pairwise(use: Use, size: int, tally: Tally, *, causal: bool) -> float:
    places, features = num_places(use, 1), features_of(use)
    if isinstance(use.role, Convolution) and use.role.groups > 1:
        return math.inf
    if is_lookup(use) and tally.grain.by_id:
        num_ids = min(size // features, places * tally.num_sequences)
        return tally.num_tokens**2 * min(places * features, size) + num_ids * tally.grain.call
    if places == 1:
        return tally.num_tokens**2 * (features + size / features)
    products = strip_operations(tally.num_tokens, places, features, per_sequence=tally.per_sequence, causal=causal)
    return SLOWER * products + tally.num_sequences**2 / 2 * tally.grain.num_blocks(features) * tally.grain.call


def strip_operations(num_tokens: int, places: int, features: int, *, per_sequence: float, causal: bool) -> float:
    """N² S d (1 + S/n) for all pairs of rows, n of them a sequence; half of it for a causal model."""
    return float(num_tokens**2) * places * features * (1 + places / per_sequence) * (0.5 if causal else 1.0)


def _formed(size: int, places: int, tally: Tally, *, causal: bool) -> float:
    return tally.num_tokens * size * (tally.num_tokens + 2.0 * places * (0.5 if causal else 1.0))


def held_bytes(traced: Traced, structure: Structure, num_params: Mapping[str, int], tally: Tally) -> dict[str, int]:
    """What is held of each parameter until its Gram is made: factors or rows of all tokens.

    Args:
        traced: A pass over the longest sequence.
        structure: What is exploited.
        num_params: {name: P_p}.
        tally: How much there is.
    """
    rows = {name: num_params[name] for name in (*structure.dense, *structure.compact)}
    factors: dict[str, float] = defaultdict(float)
    at_head, _ = apart(traced.recording, structure)
    for use in traced.recording.uses:
        features = features_of(use)
        if isinstance(use.role, Shift | Scale):
            rows[use.name] = num_params[use.name]
        elif use.name in structure.compact:
            continue
        elif any(use is other for other in at_head) or num_places(use, 1) == 1:
            factors[use.name] += features + num_params[use.name] / features
        else:
            share = strip_share(tally, num_places(use, 1), causal=structure.causal)
            factors[use.name] += num_places(use, 1) * features * share
    names = rows.keys() | factors.keys()
    return {n: int((rows.get(n, 0) + factors.get(n, 0)) * tally.num_tokens * tally.itemsize) for n in names}


def carried_bytes(
    traced: Traced, structure: Structure, num_params: Mapping[str, int], tally: Tally, held: Mapping[str, int]
) -> dict[str, Carried]:
    """What is held of the output layer once its own Gram was made, where the tensor is looked up by ids besides.

    Only columns of the cotangents of the logits whose ids occur are left. Empty where the tensor has other uses.
    """
    at_head, below = apart(traced.recording, structure)
    found = {}
    for use in at_head:
        others = [other for other in below if other.name == use.name]
        if use.multiplies and use.name not in structure.compact and others and all(map(is_lookup, others)):
            num_ids = tally.num_sequences * sum(num_places(other, 1) for other in others)
            each = tally.num_tokens * tally.itemsize
            left = held[use.name] - max(features_of(use) - num_ids, 0) * each
            points = (min(num_ids, features_of(use)) + num_params[use.name] // features_of(use)) * each
            found[use.name] = Carried(between=points, below=left)
    return found


def prefix_share(tally: Tally, *, causal: bool, chunk_size: int | None = None) -> float:
    """What cotangents that are kept for all tokens take, against whole sequences: half, and half a chunk of slots.

    Args:
        tally: How much there is.
        causal: Whether chunks run on prefixes.
        chunk_size: Slots; √S where None.
    """
    chunk = tally.num_slots**0.5 if chunk_size is None else chunk_size
    return min(1.0, 0.5 + 0.5 * chunk / tally.num_slots) if causal else 1.0


def strip_share(tally: Tally, places: int, *, causal: bool, chunk_size: int | None = None) -> float:
    """What strips hold for all tokens, against whole sequences of some places: the whole segments that rows reach into.

    Args:
        tally: How much there is.
        places: S.
        causal: Whether chunks run on prefixes.
        chunk_size: Slots; √S where None.
    """
    most, segment = held_places(places, tally.grain), tally.grain.segment
    if not causal or not places:  # an expert that got no token
        return most / max(places, 1)
    chunk = max(1, round(tally.num_slots**0.5)) if chunk_size is None else chunk_size
    ends = [min(start + chunk, tally.num_slots) for start in range(0, tally.num_slots, chunk)]
    segments = [-(-(places * end // tally.num_slots) // segment) for end in ends]
    slots = [end - start for start, end in pairwise([0, *ends])]
    held = sum(n * min(segment * count, most) for n, count in zip(slots, segments, strict=True))
    return held / (tally.num_slots * places)


def graph_bytes(traced: Traced, structure: Structure, saved: int) -> int:
    """What the passes over one sequence hold beside cotangents.

    The graph of the whole sequence, that of a prefix, and logits with their cotangents in the making.

    Args:
        traced: A pass over the longest sequence.
        structure: What is exploited.
        saved: The tensors that its graph saves.
    """
    at_head, _ = apart(traced.recording, structure)
    logits = max((use.output.numel() * use.output.element_size() for use in at_head), default=0)
    return (2 if structure.causal else 1) * saved + 4 * logits


def slot_bytes(
    traced: Traced,
    structure: Structure,
    saved_largest: int,
    takes: Callable[[str, int], bool] = lambda name, number: True,
) -> int:
    """What a batched backward pass holds for one slot of one sequence: cotangents on their way, and those kept.

    Args:
        traced: A pass over the longest sequence.
        structure: What is exploited: with an output layer the batched pass starts below it.
        saved_largest: The largest tensor of the graph.
        takes: (parameter, which use of it) → whether its cotangents are kept.
    """
    _, below = apart(traced.recording, structure)
    sizes = {id(use.output): use.output.numel() * use.output.element_size() for use in below}
    kept = {id(use.output) for use in below if takes(use.name, use.number)}
    widest = saved_largest if structure.head is None else max(sizes.values(), default=0)
    return sum(sizes[output] for output in kept) + 4 * widest


def chunk_of(tally: Tally, *, causal: bool, per_slot: int, room: int) -> int:
    """Slots a batched backward pass.

    A forward pass for every c slots costs 1/c of their backward passes, and prefixes of up to c positions too many
    cost c/S of them: √S is least; but more slots, on a CPU up to S/4, are better than sequences side by side, which
    have to be checked. Without prefixes more slots are better, up to a size.
    """
    slots, grain = tally.num_slots, tally.grain
    part = math.ceil(slots * grain.slot_share)
    best = max(round(slots**0.5), min(grain.places // slots, part)) if causal else grain.slots // 2
    most = max(1, min(best, grain.slots, slots, room // max(per_slot, 1)))
    return -(-slots // -(-slots // most))  # as many chunks, all of about one size


def hardly_shorter(length: Any, places: int) -> Any:
    """Whether a prefix is not run by itself, but the pass over the whole sequence taken; of each length in a tensor."""
    return HARDLY * (places - length) < places


def stack_width(places: int, chunk_size: int, per_sequence: int, room: int, grain: Grain) -> int:
    """Sequences that run together: enough for large matrix products, as many as there is room for."""
    wanted = round((grain.places if chunk_size > 1 else grain.places_of_samples) / (places * chunk_size))
    return max(1, min(wanted, room // max(per_sequence, 1)))
