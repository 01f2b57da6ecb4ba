"""Where the batched backward passes of a stack of sequences start, and with which cotangents.

The output layer is closed form: one backward pass of the summed loss gives every token's row of logit cotangents, and
the batched pass of a chunk of slots starts below it, at one place a token. Where the model is divided, a pass starts
from the cotangents that those before it left. Axis order: c slots of a chunk, b sequences, s places, d features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.gradients.capture.calls import Output
from fisherfunc.gradients.capture.places import own_cotangents
from fisherfunc.gradients.capture.rules import Map
from fisherfunc.gradients.capture.structure import (
    Structure,
    Traced,
    Unsettled,
    apart,
    by_sequence,
    close,
    head_of,
    trace_prefix,
    vectors,
)
from fisherfunc.gradients.data.slots import Slots
from fisherfunc.gradients.factored.groups import Taken
from fisherfunc.gradients.factored.loads import hardly_shorter
from fisherfunc.gradients.factors.pieces import Piece, factor_dtype
from fisherfunc.gradients.rows.stacks import Stack
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.factors.factors import PointFactors


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a batched backward pass starts: the forward pass, the outputs, their cotangents, its slots."""

    traced: Traced
    outputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    slots: Slots


def starts(
    work: Workload,
    stack: Stack,
    whole: Traced,
    taken: Taken,
    *,
    structure: Structure,
    leaves: Sequence[str],
    chunk_size: int,
) -> Iterator[Start | Piece]:
    """The pieces of the output layer, where the pass comes from there, and where the passes of the chunks start.

    Args:
        work: What to pass over.
        stack: Of its sequences.
        whole: The forward pass over the stack.
        taken: What is wanted.
        structure: What is exploited.
        leaves: The dense parameters that are leaves of the graph.
        chunk_size: Slots a batched backward pass.

    Raises:
        Unsettled: If the structure does not hold for these sequences.
    """
    chunks = [slice(first, first + chunk_size) for first in range(0, stack.num_slots, chunk_size)]
    if structure.head is None and taken.from_losses:
        for chunk in chunks:
            rows = stack.rows[chunk]
            cotangent = _at_losses(whole.losses, rows, stack.entry[chunk])
            yield Start(traced=whole, outputs=[whole.losses], cotangents=[cotangent], slots=Slots(rows))
        return
    below = None
    if taken.from_losses:
        at_logits = _at_logits(work, whole, structure, stack)
        yield from _head_pieces(whole, structure, stack, at_logits, taken)
        below = _below_head(work, structure, stack, at_logits)
    for number, chunk in enumerate(chunks):
        keys = None if below is not None else [key for key in taken.above[number] if key[0] > taken.floor]
        traced, ends = _shortest(work, stack, stack.position[chunk], whole, taken, structure, leaves, keys)
        if below is None:
            cotangents = [taken.above[number][key] for key in keys or ()]
        else:
            cotangents = [_at_places(ends[0], stack.position[chunk], below[chunk])]
        if any(c.shape[1:] != end.shape for c, end in zip(cotangents, ends, strict=True)):
            # The pass before was over a prefix, this one is not, or the reverse.
            raise Unsettled(replace(structure, divisible=False))
        yield Start(traced=traced, outputs=ends, cotangents=cotangents, slots=Slots(stack.rows[chunk]))


def _shortest(
    work: Workload,
    stack: Stack,
    position: Tensor,
    whole: Traced,
    taken: Taken,
    structure: Structure,
    leaves: Sequence[str],
    keys: Sequence[Output] | None,
) -> tuple[Traced, list[Tensor]]:
    """A forward pass over the shortest prefix that holds some positions, and the tensors where it ends.

    The one over whole sequences where that is hardly longer, or where a prefix has other values at its places.
    """
    ends = _ends(whole, structure, keys)
    if not structure.causal or not ends:
        return whole, ends
    length, places = int(position.max()) + 1, _by_place(ends[0], stack, keys).shape[1]
    if hardly_shorter(length, places):
        return whole, ends
    way = taken.way()
    traced = trace_prefix(work, stack.batch, length, structure, leaves=leaves, width=stack.width, way=way)
    if traced is None:
        return whole, ends
    found = _ends(traced, structure, keys)
    for value, end in zip(found, ends, strict=True):
        expected = _by_place(end, stack, keys)[:, :length]
        part = _by_place(value, stack, keys)
        if part.shape != expected.shape or not close(part, expected):
            return whole, ends
    return traced, found


def _ends(traced: Traced, structure: Structure, keys: Sequence[Output] | None) -> list[Tensor]:
    """What the calls of a segment returned; what goes into the output layer where it starts there."""
    if keys is not None:
        return [traced.recording.returned[key][0] for key in keys]
    if traced.recording.end is not None:
        return [traced.recording.end]
    return [vectors(head_of(traced.recording, structure))]


def _by_place(end: Tensor, stack: Stack, keys: Sequence[Output] | None) -> Tensor:
    return end if keys else by_sequence(end, stack.width)


def _at_losses(losses: Float[Tensor, "b s"], rows: Tensor, entry: Tensor) -> Float[Tensor, "c b s"]:
    """One for each token at its own loss."""
    cotangent = losses.new_zeros(len(rows), *losses.shape)
    return cotangent.scatter_(2, entry[..., None], (rows >= 0)[..., None].to(losses.dtype))


def _at_places(source: Tensor, position: Tensor, values: Float[Tensor, "c b d"]) -> Float[Tensor, "c ..."]:
    """Cotangents of the input of the output layer: zero but for each token's values at its own place."""
    count, width, features = values.shape
    places = source.numel() // features // width
    cotangent = values.new_zeros(count, width, places, features)
    cotangent.scatter_(2, position[..., None, None].expand(-1, -1, 1, features), values[:, :, None])
    return cotangent.reshape(count, *source.shape).to(source.dtype)


def _at_logits(work: Workload, whole: Traced, structure: Structure, stack: Stack) -> Float[Tensor, "n v"]:
    """The cotangents of the logits, each token's at its own place, in the order of slot and sequence.

    Raises:
        Unsettled: If a loss of these sequences depends on more than its own place, or on the parameters otherwise.
    """
    logits = head_of(whole.recording, structure).output
    position, entry = stack.slots.flat(stack.position), stack.slots.flat(stack.entry)
    once = work.tokens.num_targets == 1
    found = own_cotangents(whole.losses, logits, _sequence(stack), position, entry, once=once, tested=False)
    if found is None:
        raise Unsettled(replace(structure, head=None, causal=False))
    return found


def _sequence(stack: Stack) -> Int[Tensor, " n"]:
    """Which of the stack each token belongs to, in the order of slot and sequence."""
    return stack.slots.flat(torch.arange(stack.width, device=stack.rows.device).expand_as(stack.rows))


def _below_head(work: Workload, structure: Structure, stack: Stack, at_logits: Tensor) -> Float[Tensor, "c b d"]:
    """The cotangents of the input of the output layer, for each slot and sequence; 0 where there is no token."""
    assert structure.head is not None
    weight = work.params[structure.head[0]].detach()
    below = at_logits.new_zeros(*stack.rows.shape, weight.shape[1])
    below[stack.rows >= 0] = at_logits @ weight.to(at_logits.dtype)
    return below


def _head_pieces(whole: Traced, structure: Structure, stack: Stack, at_logits: Tensor, taken: Taken) -> Iterator[Piece]:
    own = at_logits.to(factor_dtype(at_logits.dtype))
    for use in apart(whole.recording, structure)[0]:
        if use.name not in taken.group.names:
            continue
        part: PointFactors | Tensor = own
        if isinstance(use.role, Map):
            shared = by_sequence(use.role.source.detach(), stack.width)[
                _sequence(stack), stack.slots.flat(stack.position)
            ]
            part = PointFactors(own=own, shared=shared.to(own), axis=use.role.axis)
        yield Piece(name=use.name, use=-1 if isinstance(use.role, Map) else 0, rows=stack.slots.present, part=part)
