"""One stack of sequences: what its backward passes give for each parameter, piece by piece.

Where the probe found the model causal, a chunk of slots runs on the shortest prefix that holds its tokens. Axis order:
c slots of a chunk, b sequences, s places, d features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.pullback import pulled_back, strided
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.capture.calls import Output, Way
from fisherfunc.gradients.capture.recording import Use, state_of
from fisherfunc.gradients.capture.rules import Convolution, Map, Scale, Shift
from fisherfunc.gradients.capture.segments import Key, Segments, strays
from fisherfunc.gradients.capture.structure import Structure, Traced, Unsettled, apart, close, settled, trace
from fisherfunc.gradients.factored.groups import Recorded, Taken
from fisherfunc.gradients.factored.starts import Start, starts
from fisherfunc.gradients.factors.pieces import (
    Inputs,
    Piece,
    at_one_place,
    inputs_by_place,
    is_lookup,
    pieces_of,
)
from fisherfunc.gradients.rows.stacks import Stack
from fisherfunc.gradients.rows.workload import Workload


def recorded_of(work: Workload, stack: Stack, structure: Structure, segments: Segments) -> Recorded:
    """Run a stack from end to end, hold it against the structure, and keep what its outer calls return.

    Raises:
        Unsettled: If the structure does not hold for these sequences.
    """
    traced = settled_pass(work, stack, structure, leaves=structure.dense, way=Way(outline=segments.outline))
    returned = traced.recording.returned
    if any(state_of(tensor) != then for tensor, then in returned.values()):  # changed by the model later
        raise Unsettled(replace(structure, divisible=False))
    uses = [use for use in traced.recording.uses if is_lookup(use)]
    return Recorded(
        losses=traced.losses.detach(),
        returned={output: tensor.detach() for output, (tensor, _) in returned.items()},
        ids={n: torch.cat([_ids(use) for use in uses if use.name == n]).unique() for n in {u.name for u in uses}},
        marks=_marks(traced.recording.uses),
    )


def _marks(uses: Sequence[Use]) -> dict[Key, Tensor]:
    """A number for each use that shows what went into it: what comes out shows nothing where a gate is closed."""
    found = {}
    for use in uses:
        with torch.no_grad():
            inputs = _into(use).detach().to(use.output.dtype)
        places = torch.arange(inputs.shape[-1] if inputs.ndim else 1, device=inputs.device, dtype=inputs.dtype)
        found[use.name, use.number] = torch.linalg.vector_norm(inputs * places.cos())
    return found


def _into(use: Use) -> Tensor:
    if isinstance(use.role, Map | Convolution):
        return use.role.source
    return use.role.factor() if isinstance(use.role, Scale) else use.output


def _ids(use: Use) -> Tensor:
    ids = inputs_by_place(use, 1).flatten()
    return ids[ids >= 0]  # those of padding have no gradient


def settled_pass(
    work: Workload, stack: Stack, structure: Structure, *, leaves: Sequence[str] | Mapping[str, str], way: Way | None
) -> Traced:
    """A pass over a whole stack, held against the structure.

    Args:
        work: What is passed over.
        stack: Of its sequences.
        structure: What is exploited.
        leaves: The dense parameters wanted.
        way: The outer calls whose values are kept.

    Raises:
        Unsettled: If parameters are used in another way, or the sequences do not run together.
    """
    mixed = Unsettled(replace(structure, stacked=False))
    try:
        whole = trace(work, stack.batch, structure, width=stack.width, leaves=leaves, way=way)
        changed = settled(structure, whole.recording)
        others = (changed.factored, changed.head) != (structure.factored, structure.head)
        if stack.width > 1 and (others or not _by_sequence(whole, stack.width)):  # another model where it runs more
            raise mixed
        if changed != structure:
            raise Unsettled(changed)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        if stack.width == 1:
            raise
        raise mixed from error
    return whole


def _by_sequence(whole: Traced, width: int) -> bool:
    """Whether losses and outputs have an axis of so many sequences: what is computed of a parameter alone has none."""
    uses = whole.recording.uses
    alone = any(isinstance(use.role, Scale | Shift) and use.output.numel() == use.size for use in uses)
    return len(whole.losses) == width and not alone and all(u.output.ndim and not len(u.output) % width for u in uses)


def stack_pieces(
    work: Workload,
    stack: Stack,
    taken: Taken,
    *,
    structure: Structure,
    chunk_size: int,
    passed: Callable[[int], None] = lambda count: None,
) -> Iterator[Piece]:
    """The pieces of the wanted parameters for the tokens of a stack; `taken.below` is filled, where there is one.

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
    leaves = [name for name in structure.dense if taken.recorded is not None or name in taken.group.names]
    whole = _whole(work, stack, taken, structure, leaves)
    keep = _inputs(whole, taken, stack.width)
    number = 0
    for start in starts(work, stack, whole, taken, structure=structure, leaves=leaves, chunk_size=chunk_size):
        if isinstance(start, Piece):
            yield start
        else:
            waiting = {} if taken.from_losses else taken.above[number]
            yield from _pulled(start, structure, taken, keep, waiting)
            passed(start.slots.num_tokens)
            number += 1


def _whole(work: Workload, stack: Stack, taken: Taken, structure: Structure, leaves: Sequence[str]) -> Traced:
    """The forward pass over a stack, of the segments that are taken.

    Raises:
        Unsettled: If the structure does not hold for these sequences.
    """
    if taken.recorded is None:
        return settled_pass(work, stack, structure, leaves=leaves, way=None)
    undivided, way = Unsettled(replace(structure, divisible=False)), taken.way()
    try:
        whole = trace(work, stack.batch, structure, leaves=leaves, width=stack.width, way=way)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:  # a model may miss what a call that is played back left behind
        raise undivided from error
    changed = settled(structure, whole.recording, cut_short=not taken.from_losses)
    if changed != structure:
        raise Unsettled(changed)
    if not _agrees(whole, taken) or _strays(whole, taken):
        raise undivided
    return whole


def _agrees(whole: Traced, taken: Taken) -> bool:
    """Whether a pass came to the values that the whole model came to."""
    assert taken.recorded is not None
    end = taken.segments.end(taken.group.start)
    pairs = [(whole.losses, taken.recorded.losses)] if end is None else []
    pairs += [(value, taken.recorded.returned[output]) for output, (value, _) in whole.recording.returned.items()]
    here, there = _marks(whole.recording.uses_here()), taken.recorded.marks
    segments, passed = taken.segments, range(taken.group.start, taken.last + 1)
    if any(key not in here for key in there if segments.of.get(key) in passed):
        return False
    pairs += [(mark, there[key]) for key, mark in here.items() if key in there]
    return all(value.shape == expected.shape and close(value.detach(), expected) for value, expected in pairs)


def _strays(whole: Traced, taken: Taken) -> list[str]:
    """The parameters that a pass reaches below its floor, past all that is played back, or does not expect at all."""
    recording = whole.recording
    roots = [whole.losses] if taken.from_losses else [tensor for tensor, _ in recording.returned.values()]
    others = {name: leaf for name, leaf in whole.leaves.items() if not taken.meets(name)}
    known = [use.name for use in recording.uses_here() if use.name not in taken.expected]
    return known + list(strays(roots, recording.played.values(), recording.uses[: recording.uses_below], others))


def _inputs(whole: Traced, taken: Taken, width: int) -> dict[tuple[str, int], Inputs]:
    """The inputs of linear maps at all places, for the chunks to share."""
    uses = [use for use in whole.recording.uses_here() if use.name in taken.group.names and isinstance(use.role, Map)]
    found = {(use.name, use.number): inputs_by_place(use, width) for use in uses}
    return {key: Inputs(given=given) for key, given in found.items() if not at_one_place(given)}


def _pulled(
    start: Start,
    structure: Structure,
    taken: Taken,
    keep: Mapping[tuple[str, int], Inputs],
    waiting: Mapping[Output, Tensor],
) -> Iterator[Piece]:
    """One batched backward pass to the outputs of the wanted uses, to the leaves, and to what was played back.

    Raises:
        Unsettled: If a prefix played back another length than the one before.
    """
    traced, recording = start.traced, start.traced.recording
    _, below = apart(recording, structure)
    here = set(map(id, recording.uses_here()))
    uses = [use for use in below if id(use) in here and use.name in taken.group.names]
    leaves = {n: leaf for n, leaf in traced.leaves.items() if n in taken.group.names and taken.meets(n)}
    played = {} if taken.below is None else recording.played
    targets = [*{id(t): t for t in (*played.values(), *(use.output for use in uses))}.values(), *leaves.values()]
    found = pulled_back(start.outputs, targets, start.cotangents) if targets else []
    gradients = dict(zip(map(id, targets), found, strict=True))
    found.clear()
    if taken.below is not None:
        ours = {output: gradients.pop(id(leaf)) for output, leaf in played.items()}
        left = {output: cotangent for output, cotangent in waiting.items() if output[0] <= taken.floor}
        taken.below.append(_added(left, ours, structure))
    for _, group in groupby(uses, key=lambda use: id(use.output)):
        together = list(group)
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


def _added(
    left: dict[Output, Tensor], ours: Mapping[Output, Tensor | None], structure: Structure
) -> dict[Output, Tensor]:
    """The cotangents of what lies below: those that other segments gave, and those of this one."""
    for output, cotangent in ours.items():
        if cotangent is None:
            continue
        if output not in left:
            left[output] = strided(cotangent)
        elif left[output].shape == cotangent.shape:
            left[output] = left[output] + cotangent
        else:
            raise Unsettled(replace(structure, divisible=False))
    return left
