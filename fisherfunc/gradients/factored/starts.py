"""Where the batched backward passes of a stack of sequences start, and with which cotangents.

The output layer is closed form: one backward pass of the summed loss gives every token's row of logit cotangents, and
the batched pass of a chunk of slots starts below it, at one place a token. Where the model is cut, a pass starts from
the cotangents that the one before it kept. Axis order: c slots of a chunk, b sequences, s places, d features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.gradients.factored.groups import Taken
from fisherfunc.gradients.factored.loads import hardly_shorter
from fisherfunc.gradients.factored.pieces import Piece, factor_dtype
from fisherfunc.gradients.factored.places import own_cotangents
from fisherfunc.gradients.factored.rules import Map
from fisherfunc.gradients.factored.structure import (
    Structure,
    Traced,
    Unsettled,
    apart,
    by_sequence,
    head_of,
    trace_prefix,
    vectors,
)
from fisherfunc.gradients.slots import Slots
from fisherfunc.gradients.stacks import Stack
from fisherfunc.gradients.workload import Workload
from fisherfunc.linalg.factors import PointFactors


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a batched backward pass starts: the forward pass, the output, its cotangents, its slots."""

    traced: Traced
    output: Tensor
    cotangent: Tensor
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
    if structure.head is None and taken.leg.start is None:
        for chunk in chunks:
            rows = stack.rows[chunk]
            cotangent = _at_losses(whole.losses, rows, stack.entry[chunk])
            yield Start(traced=whole, output=whole.losses, cotangent=cotangent, slots=Slots(rows))
        return
    below = None
    if taken.leg.start is None:
        at_logits = _at_logits(whole, structure, stack)
        yield from _head_pieces(whole, structure, stack, at_logits, taken)
        below = _below_head(work, structure, stack, at_logits)
    for number, chunk in enumerate(chunks):
        traced, end = _shortest(work, stack, stack.position[chunk], whole, taken, structure, leaves)
        cotangent = taken.above[number] if below is None else _at_places(end, stack.position[chunk], below[chunk])
        if cotangent.shape[1:] != end.shape:  # the pass before was over a prefix, this one is not, or the reverse
            raise Unsettled(replace(structure, cuttable=False))
        yield Start(traced=traced, output=end, cotangent=cotangent, slots=Slots(stack.rows[chunk]))


def _shortest(
    work: Workload,
    stack: Stack,
    position: Tensor,
    whole: Traced,
    taken: Taken,
    structure: Structure,
    leaves: Sequence[str],
) -> tuple[Traced, Tensor]:
    """A forward pass over the shortest prefix that holds some positions, and the tensor where it ends.

    The one over whole sequences where that is hardly longer.
    """
    end = whole.recording.end if taken.leg.start is not None else vectors(head_of(whole.recording, structure))
    assert end is not None
    if not structure.causal:
        return whole, end
    length = int(position.max()) + 1
    places = end.shape[1] if taken.leg.start is not None else by_sequence(end, stack.width).shape[1]
    if hardly_shorter(length, places):
        return whole, end
    traced = trace_prefix(
        work,
        stack.batch,
        length,
        whole,
        structure,
        leaves=leaves,
        width=stack.width,
        leg=taken.leg,
        known=taken.floor,
    )
    if traced is None:
        return whole, end
    assert traced.recording.end is not None
    return traced, traced.recording.end


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


def _at_logits(whole: Traced, structure: Structure, stack: Stack) -> Float[Tensor, "n v"]:
    """The cotangents of the logits, each token's at its own place, in the order of slot and sequence.

    Raises:
        Unsettled: If a loss of these sequences depends on more than its own place, or on the parameters otherwise.
    """
    logits = head_of(whole.recording, structure).output
    position, entry = stack.slots.flat(stack.position), stack.slots.flat(stack.entry)
    found = own_cotangents(whole.losses, logits, _sequence(stack), position, entry, tested=structure.tested)
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
        if not taken.takes(use.name, use.number):
            continue
        part: PointFactors | Tensor = own
        if isinstance(use.role, Map):
            shared = by_sequence(use.role.source.detach(), stack.width)[
                _sequence(stack), stack.slots.flat(stack.position)
            ]
            part = PointFactors(own=own, shared=shared.to(own), axis=use.role.axis)
        yield Piece(name=use.name, use=-1 if isinstance(use.role, Map) else 0, rows=stack.slots.present, part=part)
