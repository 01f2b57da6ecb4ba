"""What a factored pass is made of, parameter by parameter: route, reason, operations, bytes. Nothing is run here.

Counted are the operations of linear maps, two a multiplication and addition: a forward pass of p weights at S places
takes 2 p S, a backward pass to the map's input as many a token. The passes of a causal model are over prefixes: spans
count them in whole sequences.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from fisherfunc.gradients.capture.recording import Use
from fisherfunc.gradients.capture.rules import Convolution, Map, Scale, Shift
from fisherfunc.gradients.capture.structure import Structure, Traced, apart
from fisherfunc.gradients.factored.loads import Tally, hardly_shorter, strip_operations
from fisherfunc.gradients.factors.pieces import features_of, num_places
from fisherfunc.linalg.grams.token_grams import Tokens

REASONS = {
    "output layer": "one place a token, and a closed form",
    "points": "acts at one place of a sequence",
    "pairwise": "its factors are cheaper than its gradients",
    "rows": "its gradients are cheaper than its factors",
    "elementwise": "enters by a sum or an elementwise product",
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one parameter costs.

    Attributes:
        route: "pairwise", "points", "output layer", "rows", "elementwise", "autograd" or "slabs"; several, joined by
            "+", where uses of one tensor differ.
        why: In words.
        num_params: Its entries.
        held_bytes: What is held of it until its Gram is made.
        forward: Operations of all forward passes.
        backward: Of all backward passes, gradients that are formed included.
        contraction: From factors or rows to the Gram.
        places: At how many places of a sequence it acts, at most; 0 where that means nothing.
        features: Of its factors along their own axis; 0 for others.
    """

    route: str
    why: str
    num_params: int
    held_bytes: int
    forward: float
    backward: float
    contraction: float
    places: int = 0
    features: int = 0


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Passes below the output layer, in whole sequences: a prefix of half a sequence is half a pass."""

    forward: float
    backward: float


def spans_of(tokens: Tokens, chunk_size: int, *, causal: bool) -> Spans:
    """The passes over some tokens: a forward pass a sequence and a prefix, a backward pass a token on its prefix."""
    counts = tokens.sequence.bincount()
    num_sequences = int((counts > 0).sum())
    if not causal:
        return Spans(forward=float(num_sequences), backward=float(len(tokens.sequence)))
    slot = torch.arange(len(tokens.sequence), device=counts.device) - (counts.cumsum(0) - counts)[tokens.sequence]
    key = tokens.sequence * len(tokens.sequence) + slot // chunk_size
    _, chunk = key.unique(return_inverse=True)
    length = tokens.position + 1
    longest = torch.zeros_like(length).scatter_reduce_(0, chunk, length, "amax")
    whole = int(length.max())
    alone = longest[~hardly_shorter(longest, whole)]
    return Spans(forward=num_sequences + int(alone.sum()) / whole, backward=int(longest[chunk].sum()) / whole)


def costs(
    traced: Traced,
    structure: Structure,
    num_params: Mapping[str, int],
    tally: Tally,
    *,
    spans: Spans,
    held: Mapping[str, int],
    slabbed: Iterable[str],
) -> dict[str, Cost]:
    """What each parameter costs, in the order of `num_params`.

    Args:
        traced: A pass over the longest sequence.
        structure: What is exploited.
        num_params: {name: P_p}.
        tally: How much there is.
        spans: The passes.
        held: {name: bytes until its Gram is made}.
        slabbed: The parameters that the dense route takes.
    """
    at_head, _ = apart(traced.recording, structure)
    uses = defaultdict(list)
    for use in traced.recording.uses:
        uses[use.name].append(use)
    slabs = set(slabbed)
    found = {}
    for name, size in num_params.items():
        parts = [_of_use(use, at_head, structure, tally, spans) for use in uses[name]]
        if name in structure.dense or not parts:
            why = structure.dense.get(name, "not seen in use")
            parts = [_part("autograd", size, 2.0 * size * spans.forward, 4.0 * size * spans.backward, tally, why=why)]
        if name in slabs:
            parts = [_part("slabs", size, 0.0, 0.0, tally, why="what is held of it does not fit the memory limit")]
        found[name] = _together(parts, held.get(name, 0))
    return found


def _of_use(use: Use, at_head: list[Use], structure: Structure, tally: Tally, spans: Spans) -> Cost:
    if isinstance(use.role, Shift | Scale):
        entries = float(use.output.numel())
        return _part("elementwise", use.size, entries * spans.forward, entries * spans.backward, tally)
    places, features = num_places(use, 1), features_of(use)
    once = 2.0 * use.size * places if use.multiplies or isinstance(use.role, Convolution) else 0.0
    if any(use is other for other in at_head):
        contraction = float(tally.num_tokens**2) * (features + use.size / features)
        forward, backward = once * tally.num_sequences, 2.0 * use.size * tally.num_tokens
        return _part("output layer", use.size, forward, backward, tally, contraction=contraction, shape=(1, features))
    forward, backward = once * spans.forward, once * spans.backward
    grouped = isinstance(use.role, Convolution) and use.role.groups > 1
    if use.name in structure.compact or grouped:
        why = "a grouped convolution" if grouped else None
        forming = 2.0 * use.size * places * spans.backward
        return _part("rows", use.size, forward, backward + forming, tally, why=why)
    if places == 1 and not (isinstance(use.role, Map) and not use.multiplies):
        contraction = float(tally.num_tokens**2) * (features + use.size / features)
        return _part("points", use.size, forward, backward, tally, contraction=contraction, shape=(1, features))
    contraction = strip_operations(
        tally.num_tokens, places, features, per_sequence=tally.per_sequence, causal=structure.causal
    )
    if isinstance(use.role, Map) and not use.multiplies:  # the places of two sequences that share an id
        contraction = min(contraction, float(tally.num_tokens**2) * min(places * features, use.size))
    return _part("pairwise", use.size, forward, backward, tally, contraction=contraction, shape=(places, features))


def _part(
    route: str,
    size: int,
    forward: float,
    backward: float,
    tally: Tally,
    *,
    contraction: float | None = None,
    why: str | None = None,
    shape: tuple[int, int] = (0, 0),
) -> Cost:
    return Cost(
        route=route,
        why=why or REASONS[route],
        num_params=size,
        held_bytes=0,
        forward=forward,
        backward=backward,
        contraction=float(tally.num_tokens**2) * size if contraction is None else contraction,
        places=shape[0],
        features=shape[1],
    )


def _together(parts: list[Cost], held_bytes: int) -> Cost:
    """The uses of one parameter."""
    largest = max(parts, key=lambda part: part.contraction)
    return Cost(
        route="+".join(dict.fromkeys(part.route for part in parts)),
        why="; ".join(dict.fromkeys(part.why for part in parts)),
        num_params=largest.num_params,
        held_bytes=held_bytes,
        forward=sum(part.forward for part in parts),
        backward=sum(part.backward for part in parts),
        contraction=sum(part.contraction for part in parts),
        places=largest.places,
        features=largest.features,
    )
