"""What a probe on the actual model finds out before the factored route exploits it; nothing is assumed from a name.

On one sequence: which parameters have uses that a rule explains; whether the losses depend on the parameters through
one last linear map, each on its own place of it; whether a shorter sequence gives the same values at its places; which
inputs are elementwise functions. Every other sequence is held against all of it again, by collect.py; whether sequences
that run together reach one another is for separate.py.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherfunc.gradients.factored.places import own_cotangents
from fisherfunc.gradients.factored.recording import Recording
from fisherfunc.gradients.factored.rules import Map
from fisherfunc.gradients.factored.shortcuts import Origins, elementwise_origins, is_elementwise
from fisherfunc.gradients.factored.structure import (
    Structure,
    Traced,
    head_of,
    settled,
    trace,
    trace_prefix,
    vectors,
    with_leaves,
)
from fisherfunc.gradients.workload import Workload


def probe(work: Workload) -> tuple[Structure, Traced]:
    """Find the structure on the longest sequence, but for stacks. Cost: about four forward and two backward passes."""
    structure = Structure(factored=frozenset(work.params))
    traced = trace(work, work.longest, structure)
    recording = traced.recording
    unseen = set(work.params) - {use.name for use in recording.uses} - set(recording.unknown)
    found = with_leaves(settled(structure, recording), unseen, "not seen in use")
    if found != structure:
        structure, traced = found, trace(work, work.longest, found, leaves=found.dense)
    structure = replace(structure, head=_head(traced, work), shortcuts=_shortcuts(traced.recording))
    if structure.head is None:
        return structure, traced
    return replace(structure, causal=_is_causal(work, structure, traced)), traced


def _head(traced: Traced, work: Workload) -> tuple[str, int] | None:
    """The last linear map through which all losses go, each through its own place alone."""
    last = next((use for use in reversed(traced.recording.uses) if use.multiplies), None)
    if last is None or not isinstance(last.role, Map) or last.role.axis != 0:
        return None
    fullest = work.tokens.sequence == work.tokens.sequence.bincount().argmax()
    own = work.tokens.select(fullest.nonzero().squeeze(-1))
    found = own_cotangents(traced.losses, last.output, torch.zeros_like(own.position), own.position, own.entry)
    return None if found is None else (last.name, last.number)


def _is_causal(work: Workload, structure: Structure, traced: Traced) -> bool:
    whole = vectors(head_of(traced.recording, structure))
    lengths = {1, whole.shape[1] // 2} - {0} if whole.ndim == 3 else set()
    found = [trace_prefix(work, work.longest, length, traced, structure) for length in lengths]
    return bool(found) and all(prefix is not None for prefix in found)


def _shortcuts(recording: Recording) -> dict[tuple[str, int], Origins]:
    """The uses whose inputs are elementwise functions of the outputs of earlier ones, and no mere views of them."""
    nodes = {torch.autograd.graph.get_gradient_edge(u.output).node: (u.name, u.number) for u in recording.uses}
    outputs = {(use.name, use.number): use.output for use in recording.uses}
    found = {}
    for use in recording.uses:
        if use.multiplies and vectors(use).grad_fn is not None:
            origins = elementwise_origins(vectors(use), nodes) or frozenset()
            sources = [outputs[origin] for origin in origins]
            if sources and not _is_view(vectors(use), sources) and is_elementwise(vectors(use), sources):
                found[use.name, use.number] = origins
    return found


def _is_view(tensor: Tensor, sources: Sequence[Tensor]) -> bool:
    """Whether it shares its memory with one of the sources: nothing is computed on the way to it."""
    memory = tensor.untyped_storage().data_ptr()
    return any(source.untyped_storage().data_ptr() == memory for source in sources)
