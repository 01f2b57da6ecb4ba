"""What may be exploited of a model, and forward passes that record how it uses its parameters.

The structure is found on one sequence (probe.py), and every pass over others is held against the part of it that costs
nothing to see; of the rest the check of the Grams is the judge (certificate.py), or of a few the trial (trial.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.module_calls import Again, answered_by
from fisherfunc.gradients.autodiff.pullback import leaves_of, reached_leaves
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.capture.calls import Way
from fisherfunc.gradients.capture.recorder import Differentiation, Recorder
from fisherfunc.gradients.capture.recording import Directions, Reached, Recording, Use
from fisherfunc.gradients.capture.rules import Map
from fisherfunc.gradients.data.batches import shortened
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.records.axes import Batch

EXPLOITS = ("segments", "stacks", "prefixes")
"""What a pass is right without."""
CUTS = dict.fromkeys(("segments", "prefixes"), "a gradient is taken inside the model or its loss")
"""What is given up where the graph of a forward pass is asked for before its end."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What may be exploited.

    Attributes:
        factored: Parameters of which every use is explained by a rule.
        dense: {parameter: why its gradients come from autograd}.
        compact: Parameters among `factored` whose gradients are formed, as their Gram is then cheaper.
        protected: Parameters whose outputs the model overwrites.
        head: The last linear map, a parameter and which use of it; None where the losses are no function of it, place
            by place.
        causal: Whether a prefix of a sequence gives the same values at its places.
        stacked: Whether sequences run together do not reach one another.
        divisible: Whether passes may start and end between calls of modules.
        refused: {exploit: why it was given up}.
    """

    factored: frozenset[str]
    dense: dict[str, str] = field(default_factory=dict)
    compact: frozenset[str] = frozenset()
    protected: frozenset[str] = frozenset()
    head: tuple[str, int] | None = None
    causal: bool = False
    stacked: bool = False
    divisible: bool = True
    refused: dict[str, str] = field(default_factory=dict)


class Unsettled(Exception):  # noqa: N818 (it is no error: the caller starts again with the structure that it carries)
    """A sequence uses a parameter in a way that the structure found on another one does not allow for."""

    def __init__(self, structure: Structure) -> None:
        super().__init__("the sequences use the parameters in different ways")
        self.structure = structure


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One recorded forward pass.

    Attributes:
        losses: `(b, s)`, in the graph; none for a pass that was cut short.
        recording: The uses of the factored parameters.
        leaves: The dense parameters, as leaves of the graph.
        watched: The factored ones, as the model got them.
    """

    losses: Tensor
    recording: Recording
    leaves: dict[str, Tensor]
    watched: dict[str, Tensor]


def trace(
    work: Workload,
    batch: Batch,
    structure: Structure,
    *,
    leaves: Iterable[str] = (),
    width: int = 1,
    way: Way | None = None,
    note: bool = False,
) -> Traced:
    """Run some sequences with every use of a factored parameter recorded and the named dense ones as leaves.

    Args:
        work: What is passed over.
        batch: The sequences.
        structure: What is exploited.
        leaves: The dense parameters wanted.
        width: The number of sequences.
        way: What is played back, and where the pass ends.
        note: Whether to say which modules were called.

    Raises:
        Unsettled: If the model does not call its modules as the way says.
    """
    directions = replace(_directions(structure, width), way=way, note=note)
    with _ran(work, batch, structure, leaves, directions) as (output, traced):
        recording = traced.recording
        if not _as_told(recording, way):
            raise Unsettled(replace(structure, divisible=False))
        if way is not None and way.end is not None:
            return traced
        with torch.enable_grad(), Differentiation(recording):
            end = work.loss.values(output, batch)
    watched = {id(tensor): name for name, tensor in traced.watched.items()}
    for leaf in reached_leaves(end.grad_fn) if end.requires_grad else ():
        if id(leaf) in watched:  # what is explained leads to no leaf
            traced.recording.unknown.setdefault(watched[id(leaf)], "a function that cannot be seen")
    return replace(traced, losses=end)


def _as_told(recording: Recording, way: Way | None) -> bool:
    """Whether the outer calls were those of the outline, and the pass ended where it was to end."""
    if way is None:
        return True
    return not recording.astray and (way.end is None or any(rank == way.end for rank, _ in recording.returned))


def trace_prefix(
    work: Workload,
    batch: Batch,
    length: int,
    structure: Structure,
    *,
    leaves: Iterable[str] = (),
    width: int = 1,
    way: Way | None = None,
) -> Traced | None:
    """Run the first `length` positions, to the end of the way or, where that is the losses, to the last linear map.

    None where the model is not made for that.
    """
    prefix = shortened(batch, length)
    if prefix is None:
        return None
    at_head = way is None or way.end is None
    if way is not None:
        way = replace(way, played={output: value[:, :length] for output, value in way.played.items()})
    directions = replace(_directions(structure, width), way=way, last=structure.head if at_head else None)
    try:
        with _ran(work, prefix, structure, leaves, directions) as (_, traced):
            recording = traced.recording
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:  # a length that the model is not made for; the whole sequence is as right
        return None
    if at_head != (recording.end is not None) or not _as_told(recording, way):
        return None
    return None if settled(structure, recording, cut_short=True) != structure else traced


def _directions(structure: Structure, width: int) -> Directions:
    return Directions(protected=structure.protected, width=width)


@contextmanager
def _ran(
    work: Workload, batch: Batch, structure: Structure, leaves: Iterable[str], directions: Directions
) -> Iterator[tuple[Any, Traced]]:
    """Run the model; inside, gradients that are taken are still recorded.

    Raises:
        Unsettled: If the model takes gradients of its own that the structure does not allow for.
    """
    constants = {name: p.detach() for name, p in work.params.items()}
    while True:
        leaf = leaves_of({name: work.params[name] for name in leaves})
        watched = leaves_of({name: work.params[name] for name in work.params if name in structure.factored})
        recorder, output = Recorder(watched, directions), None
        with closing(recorder):
            try:
                with torch.enable_grad(), recorder, answered_by(recorder.answer), suppress(Reached):
                    output = work.fn.apply({**constants, **watched, **leaf}, batch)
            except Again:
                continue
            if recorder.recording.interrupted:
                raise Unsettled(settled(structure, recorder.recording, cut_short=True))
            none = torch.empty(0, device="cpu")
            yield output, Traced(losses=none, recording=recorder.recording, leaves=leaf, watched=watched)
            return


def settled(structure: Structure, recording: Recording, *, cut_short: bool = False) -> Structure:
    """The structure put right by a recording: parameters of unknown use are leaves, overwritten outputs copied."""
    for name, function in recording.unknown.items():
        structure = with_leaves(structure, [name], f"used by {function}")
    if recording.differentiates:
        structure = refusing(structure, CUTS)
    head_seen = cut_short or any((u.name, u.number) == structure.head for u in recording.uses if u.multiplies)
    if structure.head is not None and not head_seen:
        structure = replace(structure, head=None, causal=False)
    return replace(structure, protected=structure.protected | recording.overwritten())


def with_leaves(structure: Structure, names: Iterable[str], reason: str) -> Structure:
    """The structure with some of the factored parameters among the dense ones."""
    moved = {name: reason for name in names if name in structure.factored}
    structure = replace(
        structure,
        factored=structure.factored - set(moved),
        compact=structure.compact - set(moved),
        dense={**structure.dense, **moved},
        stacked=structure.stacked and not moved,
    )
    head_moved = structure.head is not None and structure.head[0] in moved
    return replace(structure, head=None, causal=False) if head_moved else structure


def refusing(structure: Structure, refused: Mapping[str, str]) -> Structure:
    """Give up some exploits and parameters' factors.

    Args:
        structure: What is exploited.
        refused: {"segments", "stacks", "prefixes" or a parameter: why}.
    """
    for name in structure.factored & refused.keys():
        structure = with_leaves(structure, [name], refused[name])
    return replace(
        structure,
        divisible=structure.divisible and "segments" not in refused,
        stacked=structure.stacked and "stacks" not in refused,
        causal=structure.causal and "prefixes" not in refused,
        refused={**structure.refused, **{name: why for name, why in refused.items() if name in EXPLOITS}},
    )


def head_of(recording: Recording, structure: Structure) -> Use:
    """The use of the last linear map."""
    return next(use for use in recording.uses if use.multiplies and (use.name, use.number) == structure.head)


def apart(recording: Recording, structure: Structure) -> tuple[list[Use], list[Use]]:
    """The uses at the last linear map (its weight, its bias), and all others."""
    heads = [use for use in recording.uses if use.multiplies and (use.name, use.number) == structure.head]
    output = heads[0].output if heads and recording.end is None else None
    at_head = [use for use in recording.uses if use.output is output]
    return at_head, [use for use in recording.uses if use.output is not output]


def vectors(use: Use) -> Tensor:
    """The input of a linear map."""
    assert isinstance(use.role, Map)
    return use.role.source


def by_sequence(values: Tensor, width: int) -> Tensor:
    """`(…, d)` with all leading axes as `(b, s, d)`, the sequences of a stack first."""
    return values.reshape(width, -1, values.shape[-1])


def close(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree well within what is promised of a Gram (1e-9 in float64, 1e-4 in float32)."""
    tolerance = torch.finfo(value.dtype).eps ** 0.7
    return bool(torch.linalg.vector_norm(value - expected) <= tolerance * torch.linalg.vector_norm(expected))
