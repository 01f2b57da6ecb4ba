"""One stack of sequences: what its backward passes give for each parameter, piece by piece.

Where the probe found the model causal, a chunk of slots runs on the shortest prefix that holds its tokens. Axis order:
c slots of a chunk, b sequences, s places, d features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from fisherfunc.gradients.factored.cuts import strays
from fisherfunc.gradients.factored.groups import Taken
from fisherfunc.gradients.factored.known import settled_pass
from fisherfunc.gradients.factored.pieces import Piece, at_one_place, inputs_by_place, kept_places, pieces_of
from fisherfunc.gradients.factored.recording import Use
from fisherfunc.gradients.factored.rules import Map
from fisherfunc.gradients.factored.starts import Start, starts
from fisherfunc.gradients.factored.structure import Structure, Traced, Unsettled, apart, settled, trace
from fisherfunc.gradients.pullback import strided
from fisherfunc.gradients.refusals import REFUSALS
from fisherfunc.gradients.stacks import Stack
from fisherfunc.gradients.workload import Workload


def stack_pieces(
    work: Workload,
    stack: Stack,
    taken: Taken,
    *,
    structure: Structure,
    chunk_size: int,
    passed: Callable[[int], None] = lambda count: None,
) -> Iterator[Piece | Tensor]:
    """The pieces of the wanted parameters for the tokens of a stack, and a chunk's cotangents at the cut to be kept.

    Args:
        work: What to pass over.
        stack: Of its sequences.
        taken: What is wanted.
        structure: What is exploited.
        chunk_size: Slots a batched backward pass.
        passed: Called with the number of tokens of each chunk, when its pieces were taken.

    Raises:
        Unsettled: If the structure does not hold for these sequences.
    """
    # With cuts all of them are leaves, whatever is wanted, so that every pass counts the same calls.
    leaves = [name for name in structure.dense if taken.levels.cuts or taken.takes(name, -1)]
    whole = _whole(work, stack, taken, structure, leaves)
    keep = _inputs(whole, taken, stack.width)
    for start in starts(work, stack, whole, taken, structure=structure, leaves=leaves, chunk_size=chunk_size):
        if isinstance(start, Piece):
            yield start
        else:
            yield from _pulled(start, structure, taken, keep)
            passed(start.slots.num_tokens)


def _whole(work: Workload, stack: Stack, taken: Taken, structure: Structure, leaves: Sequence[str]) -> Traced:
    """The forward pass over a stack on the leg that is taken.

    Raises:
        Unsettled: If the structure does not hold for these sequences.
    """
    if taken.known is None:
        return settled_pass(work, stack, structure, leaves=leaves, leg=taken.leg)
    uncut = Unsettled(replace(structure, cuttable=False))
    try:
        whole = trace(work, stack.batch, structure, leaves=leaves, width=stack.width, leg=taken.leg, known=taken.floor)
    except REFUSALS as error:  # what is below the floor is not computed, which a model may notice
        raise uncut from error
    changed = settled(structure, whole.recording, cut_short=True)
    if changed != structure:
        raise Unsettled(changed)
    if not taken.known.agrees(whole, taken.leg):
        raise uncut
    return whole


def _inputs(whole: Traced, taken: Taken, width: int) -> dict[tuple[str, int, int], Tensor]:
    """The inputs of linear maps at all places, for the chunks to share."""
    found = {}
    for use in whole.recording.uses:
        if taken.takes(use.name, use.number) and isinstance(use.role, Map):
            everywhere = inputs_by_place(use, width)
            for b, inputs in enumerate(() if at_one_place(everywhere) else everywhere):
                found[use.name, use.number, b] = kept_places(inputs)[0]
    return found


def _pulled(
    start: Start, structure: Structure, taken: Taken, keep: dict[tuple[str, int, int], Tensor]
) -> Iterator[Piece | Tensor]:
    """One batched backward pass to the outputs of the wanted uses, to the leaves, and to the cut to be kept.

    Raises:
        Unsettled: If a parameter is used more often than where the model was cut, so that no level is known.
    """
    traced = start.traced
    _, below = apart(traced.recording, structure)
    if not all(taken.knows(use.name, use.number) for use in below):
        raise Unsettled(replace(structure, cuttable=False))
    uses = [use for use in below if taken.takes(use.name, use.number)]
    leaves = {name: leaf for name, leaf in traced.leaves.items() if taken.takes(name, -1)}
    cut = _cut(start, below, taken, structure)
    targets = [*{id(t): t for t in (*cut, *(use.output for use in uses))}.values(), *leaves.values()]
    if not targets or not start.output.requires_grad:
        return
    found = pulled_back(start.output, targets, start.cotangent)
    gradients = dict(zip(map(id, targets), found, strict=True))
    found.clear()
    for tensor in cut:
        kept = gradients[id(tensor)]
        yield start.cotangent.new_zeros(len(start.slots.rows), *tensor.shape) if kept is None else strided(kept)
    for _, here in groupby(uses, key=lambda use: id(use.output)):
        together = list(here)
        cotangent = gradients.pop(id(together[0].output))
        if cotangent is not None:
            for use in together:
                compact = use.name in structure.compact
                yield from pieces_of(use, cotangent, start.slots, compact=compact, keep=keep)
    for name, leaf in leaves.items():
        gradient = gradients[id(leaf)]
        if gradient is not None:
            rows = start.slots.flat(strided(gradient).reshape(len(gradient), 1, -1))
            yield Piece(name=name, use=0, rows=start.slots.present, part=rows)


def _cut(start: Start, uses: Sequence[Use], taken: Taken, structure: Structure) -> list[Tensor]:
    """The cut where cotangents are to be kept, if there is one.

    Raises:
        Unsettled: If a parameter below it is reached past it.
    """
    cut = start.traced.recording.cut_tensor()
    if taken.leg.end is None or cut is None:
        return []
    if strays(start.output, cut, uses, start.traced.leaves, taken.above_end()):
        raise Unsettled(replace(structure, cuttable=False))
    return [cut]


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
