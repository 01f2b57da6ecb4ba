"""What a probe on the actual model finds out before the factored route exploits it; nothing is assumed from a name.

On one sequence: which parameters have uses that a rule explains; whether the losses depend on the parameters through
one last linear map, each on its own place of it; whether a shorter sequence gives the same values at its places, where
that is of use. That
it holds for all other sequences is for the check of the Grams (certificate.py).
"""

from dataclasses import replace

import torch

from fisherfunc.gradients.capture.places import own_cotangents
from fisherfunc.gradients.capture.rules import Map
from fisherfunc.gradients.capture.structure import (
    Structure,
    Traced,
    Unsettled,
    close,
    head_of,
    settled,
    trace,
    trace_prefix,
    vectors,
    with_leaves,
)
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.records.axes import Batch
from fisherfunc.runtime.memory import SavedBytes


def probe(work: Workload) -> tuple[Structure, Traced, SavedBytes]:
    """Find the structure on the longest sequence, but for stacks and prefixes.

    Cost: about a forward pass and, down to the last linear map, some backward ones.

    Returns:
        The structure, a pass over the sequence, and what this saves.
    """
    structure, batch = Structure(factored=frozenset(work.params)), work.longest
    while True:
        try:
            traced, saved = _looked(work, batch, structure)
        except Unsettled as found:
            structure = found.structure
            continue
        recording = traced.recording
        unseen = set(work.params) - {use.name for use in recording.uses} - set(recording.unknown)
        changed = with_leaves(settled(structure, recording), unseen, "not seen in use")
        if changed == structure:
            break
        structure = changed
    return replace(structure, head=_head(traced, work)), traced, saved


def _looked(work: Workload, batch: Batch, structure: Structure) -> tuple[Traced, SavedBytes]:
    with SavedBytes() as saved:  # of one pass: memory of others is used again
        traced = trace(work, batch, structure, leaves=structure.dense, note=True)
    return traced, saved


def _head(traced: Traced, work: Workload) -> tuple[str, int] | None:
    """The last linear map through which all losses go, each through its own place alone."""
    last = next((use for use in reversed(traced.recording.uses) if use.multiplies), None)
    if last is None or not isinstance(last.role, Map) or last.role.axis != 0:
        return None
    fullest = work.tokens.sequence == work.tokens.sequence.bincount().argmax()
    own = work.tokens.select(fullest.nonzero().squeeze(-1))
    sequence, once = torch.zeros_like(own.position), own.num_targets == 1
    found = own_cotangents(traced.losses, last.output, sequence, own.position, own.entry, once=once)
    return None if found is None else (last.name, last.number)


def is_causal(work: Workload, structure: Structure, traced: Traced) -> bool:
    """Return whether half a sequence gives the same values at its places.

    Every prefix that is run is held against them. Cost: a forward pass over half of the longest sequence.

    Args:
        work: What is passed over.
        structure: What is known; it has a last linear map.
        traced: A pass over the longest sequence.
    """
    whole = vectors(head_of(traced.recording, structure))
    if whole.ndim != 3 or whole.shape[1] < 1:
        return False
    length = max(1, whole.shape[1] // 2)
    part = trace_prefix(work, work.longest, length, structure)
    if part is None or part.recording.end is None:
        return False
    return part.recording.end.shape == whole[:, :length].shape and close(part.recording.end, whole[:, :length])
