"""One stack of sequences: what its backward passes give for each parameter, piece by piece.

The output layer is closed form: one backward pass of the summed loss gives every token's row of logit cotangents, and
the batched pass of a chunk of slots starts below it, at one place a token. Where the probe found the model causal, a
chunk runs on the shortest prefix that holds its tokens. Axis order: c slots of a chunk, b sequences, s places, d
features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.factored.pieces import Piece, factor_dtype, inputs_by_place, kept_places, pieces_of
from fisherfunc.gradients.factored.places import own_cotangents
from fisherfunc.gradients.factored.rules import Map
from fisherfunc.gradients.factored.separate import sequences_apart
from fisherfunc.gradients.factored.structure import (
    Structure,
    Traced,
    Unsettled,
    apart,
    by_sequence,
    head_of,
    settled,
    trace,
    trace_prefix,
    vectors,
)
from fisherfunc.gradients.pullback import strided
from fisherfunc.gradients.stacks import Stack
from fisherfunc.gradients.workload import Workload
from fisherfunc.linalg.factors import PointFactors


def stack_pieces(
    work: Workload,
    stack: Stack,
    *,
    structure: Structure,
    wanted: frozenset[str],
    chunk_size: int,
    passed: Callable[[int], None] = lambda count: None,
) -> Iterator[Piece]:
    """The pieces of the wanted parameters for the tokens of a stack.

    Args:
        work: What to pass over.
        stack: Of its sequences.
        structure: What is exploited.
        wanted: The parameters.
        chunk_size: Slots a batched backward pass.
        passed: Called with the number of tokens of each chunk, when its pieces were taken.

    Raises:
        Unsettled: If the structure does not hold for these sequences.
    """
    leaves = [name for name in structure.dense if name in wanted]
    whole = trace(work, stack.batch, structure, leaves=leaves, width=stack.width)
    changed = settled(structure, whole.recording)
    if changed != structure:
        raise Unsettled(changed)
    if stack.width > 1:
        _check_apart(work, stack, structure, whole)
    keep = _inputs(whole, wanted, stack.width)
    for start in _starts(work, stack, structure, whole, leaves, wanted, chunk_size):
        if isinstance(start, Piece):
            yield start
        else:
            yield from _pulled(start, structure, wanted, keep)
            passed(int((start.rows >= 0).sum()))


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a batched backward pass starts: the forward pass, the output, its cotangents, its rows of the Gram."""

    traced: Traced
    output: Tensor
    cotangent: Tensor
    rows: Tensor


def _starts(
    work: Workload,
    stack: Stack,
    structure: Structure,
    whole: Traced,
    leaves: Sequence[str],
    wanted: frozenset[str],
    chunk_size: int,
) -> Iterator[_Start | Piece]:
    """The pieces of the output layer, and then where the backward passes of the chunks start."""
    chunks = [slice(first, first + chunk_size) for first in range(0, stack.num_slots, chunk_size)]
    if structure.head is None:
        for chunk in chunks:
            rows = stack.rows[chunk]
            cotangent = _at_losses(whole.losses, rows, stack.entry[chunk])
            yield _Start(traced=whole, output=whole.losses, cotangent=cotangent, rows=rows)
        return
    at_logits = _at_logits(whole, structure, stack)
    yield from _head_pieces(whole, structure, stack, at_logits, wanted)
    weight = work.params[structure.head[0]].detach()
    below = at_logits.new_zeros(*stack.rows.shape, weight.shape[1])
    below[stack.rows >= 0] = at_logits @ weight.to(at_logits.dtype)
    for chunk in chunks:
        position = stack.position[chunk]
        traced = None
        if structure.causal:
            length = int(position.max()) + 1
            traced = trace_prefix(work, stack.batch, length, whole, structure, leaves=leaves, width=stack.width)
        source = vectors(head_of(whole.recording, structure)) if traced is None else traced.recording.end
        assert source is not None
        cotangent = _at_places(source, position, below[chunk])
        yield _Start(traced=traced or whole, output=source, cotangent=cotangent, rows=stack.rows[chunk])


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
    there = stack.rows >= 0
    sequence = torch.arange(stack.width, device=there.device).expand_as(stack.rows)[there]
    logits = head_of(whole.recording, structure).output
    found = own_cotangents(whole.losses, logits, sequence, stack.position[there], stack.entry[there])
    if found is None:
        raise Unsettled(replace(structure, head=None, causal=False))
    return found


def _head_pieces(
    whole: Traced, structure: Structure, stack: Stack, at_logits: Tensor, wanted: frozenset[str]
) -> Iterator[Piece]:
    there = stack.rows >= 0
    sequence = torch.arange(stack.width, device=there.device).expand_as(stack.rows)[there]
    left = at_logits.to(factor_dtype(at_logits.dtype))
    for use in apart(whole.recording, structure)[0]:
        if use.name not in wanted:
            continue
        part: PointFactors | Tensor = left
        if isinstance(use.role, Map):
            right = by_sequence(use.role.source.detach(), stack.width)[sequence, stack.position[there]]
            part = PointFactors(left=left, right=right.to(left))
        yield Piece(name=use.name, use=-1 if isinstance(use.role, Map) else 0, rows=stack.rows[there], part=part)


def _inputs(whole: Traced, wanted: frozenset[str], width: int) -> dict[tuple[str, int, int], Tensor]:
    """The inputs of linear maps at all places, for the chunks to share."""
    found = {}
    for use in whole.recording.uses:
        if use.name in wanted and isinstance(use.role, Map):
            for b, inputs in enumerate(inputs_by_place(use, width)):
                found[use.name, use.number, b] = kept_places(inputs)[0]
    return found


def _pulled(
    start: _Start, structure: Structure, wanted: frozenset[str], keep: dict[tuple[str, int, int], Tensor]
) -> Iterator[Piece]:
    """One batched backward pass to the outputs of the wanted uses and to the leaves."""
    leaves = start.traced.leaves
    _, below = apart(start.traced.recording, structure)
    uses = [use for use in below if use.name in wanted]
    targets = [*{id(use.output): use.output for use in uses}.values(), *leaves.values()]
    if not targets or not start.output.requires_grad:
        return
    found = pulled_back(start.output, targets, start.cotangent)
    gradients = dict(zip(map(id, targets), found, strict=True))
    found.clear()
    for _, here in groupby(uses, key=lambda use: id(use.output)):
        together = list(here)
        cotangent = gradients.pop(id(together[0].output))
        if cotangent is not None:
            for use in together:
                compact = use.name in structure.compact
                yield from pieces_of(use, cotangent, start.rows, compact=compact, keep=keep)
    there = start.rows[:, 0] >= 0
    for name, leaf in leaves.items():
        gradient = gradients[id(leaf)]
        if gradient is not None:
            rows = strided(gradient).reshape(len(there), -1)[there]
            yield Piece(name=name, use=0, rows=start.rows[there, 0], part=rows)


def pulled_back(output: Tensor, targets: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    """The cotangents of some tensors, each with the leading axis of `cotangent`; an ordinary pass for a single one."""
    batched = len(cotangent) > 1
    found = torch.autograd.grad(
        output,
        targets,
        cotangent if batched else cotangent[0],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    return [g if batched or g is None else g[None] for g in found]


def _check_apart(work: Workload, stack: Stack, structure: Structure, whole: Traced) -> None:
    """Hold the sequences of a stack against each other.

    Raises:
        Unsettled: If one of them reaches another.
    """
    if not sequences_apart(work, stack, structure, whole):
        raise Unsettled(replace(structure, stacked=False))
