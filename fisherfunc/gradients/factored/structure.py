"""What a probe on the actual model finds out before the factored route exploits it; nothing is assumed from a name.

On one sequence: which parameters enter through linear maps only; whether the losses depend on the parameters through
one last linear map, each on its own place of it; whether a shorter sequence gives the same values at its places. Every
other sequence is held against all three again, by collect.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.factored._taps import Recorder, Recording, Use
from fisherfunc.gradients.pullback import leaves_of
from fisherfunc.gradients.sequences import shortened
from fisherfunc.gradients.workload import Workload
from fisherfunc.records.axes import Batch


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What may be exploited.

    Attributes:
        factored: Parameters that enter through linear maps only.
        dense: {parameter: why its gradients are formed}.
        protected: Parameters whose outputs the model overwrites.
        head: The weight of the last linear map; None where the losses are not a function of it, place by place.
        causal: Whether a prefix of a sequence gives the same values at its places.
    """

    factored: frozenset[str]
    dense: dict[str, str]
    protected: frozenset[str]
    head: str | None
    causal: bool


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One recorded forward pass.

    Attributes:
        losses: `(s,)`, in the graph; none for a prefix.
        recording: The uses of the factored parameters.
        leaves: The dense parameters, as leaves of the graph.
    """

    losses: Tensor
    recording: Recording
    leaves: dict[str, Tensor]


def trace(work: Workload, sequence: Batch, structure: Structure, formed: Iterable[str] | None = None) -> Traced:
    """Run one sequence with every use of a factored parameter recorded and the dense ones (or `formed`) as leaves."""
    output, traced = _run(work, sequence, structure, structure.dense if formed is None else formed)
    with torch.enable_grad():
        return replace(traced, losses=work.loss.values(output, sequence)[0])


REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def trace_prefix(
    work: Workload, sequence: Batch, length: int, whole: Traced, structure: Structure, formed: Iterable[str]
) -> Traced | None:
    """Run the first `length` positions; None where that does not do what the whole sequence does at these places."""
    prefix = shortened(sequence, length)
    if prefix is None:
        return None
    try:
        _, traced = _run(work, prefix, structure, formed)
    except REFUSALS:  # a length that the model is not made for; the whole sequence is as right
        return None
    if settled(structure, traced.recording) != structure:
        return None
    part = head_of(traced.recording, structure).source
    expected = head_of(whole.recording, structure).source[:, :length]
    same = part.shape == expected.shape and part.shape[1:2] == (length,) and close(part, expected)
    return traced if same else None


def _run(work: Workload, sequence: Batch, structure: Structure, formed: Iterable[str]) -> tuple[Any, Traced]:
    constants = {name: p.detach() for name, p in work.params.items()}
    leaves = leaves_of({name: work.params[name] for name in formed})
    recorder = Recorder({name: constants[name] for name in structure.factored}, protected=structure.protected)
    with torch.enable_grad(), recorder:
        output = work.fn.apply({**constants, **leaves}, sequence)
    return output, Traced(losses=torch.empty(0), recording=recorder.recording, leaves=leaves)


def probe(work: Workload) -> Structure:
    """Find the structure on the longest sequence. Cost: about five forward and two backward passes."""
    structure = Structure(factored=frozenset(work.params), dense={}, protected=frozenset(), head=None, causal=False)
    recording = trace(work, work.longest, structure).recording
    unseen = set(work.params) - {use.name for use in recording.uses} - set(recording.unknown)
    structure = formed(settled(structure, recording), unseen, "not seen in use")
    traced = trace(work, work.longest, structure)
    head = _head(traced, work)
    structure = replace(structure, head=head)
    if head is None:
        return structure
    return replace(structure, causal=_is_causal(work, structure, traced))


def settled(structure: Structure, recording: Recording) -> Structure:
    """The structure put right by a recording: parameters of unknown use are formed, overwritten outputs copied."""
    biases = {use.name for use in recording.uses if use.is_bias}
    weights = {use.name for use in recording.uses if not use.is_bias}
    unknown = {**recording.unknown, **dict.fromkeys(biases & weights, "both as a weight and as a bias")}
    for name, reason in unknown.items():
        structure = formed(structure, [name], f"used by {reason}")
    if all(use.name != structure.head for use in _multiplied(recording)):
        structure = replace(structure, head=None, causal=False)
    return replace(structure, protected=structure.protected | recording.overwritten())


def formed(structure: Structure, names: Iterable[str], reason: str) -> Structure:
    """The structure with some of the factored parameters among the dense ones."""
    moved = {name: reason for name in names if name in structure.factored}
    structure = replace(structure, factored=structure.factored - set(moved), dense={**structure.dense, **moved})
    return replace(structure, head=None, causal=False) if structure.head in moved else structure


def head_of(recording: Recording, structure: Structure) -> Use:
    """The use of the last linear map."""
    return next(u for u in reversed(_multiplied(recording)) if u.name == structure.head)


def _multiplied(recording: Recording) -> list[Use]:
    """The uses of weights that inputs are multiplied by: no biases, no embeddings of ids."""
    return [use for use in recording.uses if not use.is_bias and use.source.is_floating_point()]


def apart(recording: Recording, structure: Structure) -> tuple[list[Use], list[Use]]:
    """The uses at the last linear map (its weight, its bias), and all others."""
    if structure.head is None:
        return [], list(recording.uses)
    output = head_of(recording, structure).output
    at_head = [use for use in recording.uses if use.output is output]
    return at_head, [use for use in recording.uses if use.output is not output]


def own_cotangents(losses: Tensor, output: Tensor, position: Tensor) -> Float[Tensor, "n v"] | None:
    """∂ℓ_n/∂output[n] for the losses at `position`; None where one depends on another place, or not through `output`.

    Exact: where the cotangents of some losses are zero, so are those of their places. Two places differ in a bit of
    their number, so that halves by each bit tell them all apart. Cost: 1 + 2 log₂ N backward passes down to `output`.
    """
    places = output.numel() // output.shape[-1]
    if int(position.max()) >= places or _bypassed(losses, output):
        return None

    def rows(some: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(losses[some].sum(), output, retain_graph=True, allow_unused=True)
        return torch.zeros_like(output).reshape(places, -1) if found is None else found.reshape(places, -1)

    together = rows(position)
    elsewhere = torch.ones(places, dtype=torch.bool, device=output.device).index_fill(0, position, value=False)
    if bool(together[elsewhere].any()):
        return None
    number = torch.arange(len(position), device=position.device)
    for bit in range((len(position) - 1).bit_length()):
        half = (number >> bit) % 2 == 0
        for some, others in ((half, ~half), (~half, half)):
            if bool(rows(position[some])[position[others]].any()):
                return None
    return together[position]


def _bypassed(losses: Tensor, output: Tensor) -> bool:
    """Whether the graph leads from the losses to a leaf past `output`."""
    seen = {torch.autograd.graph.get_gradient_edge(output).node, None}
    waiting: list[Any] = [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if hasattr(node, "variable"):
            return True
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    return False


def _head(traced: Traced, work: Workload) -> str | None:
    """The last weight use through which all losses go, each through its own place alone."""
    candidates = _multiplied(traced.recording)
    if not candidates or candidates[-1].axis != 0:
        return None
    position = work.tokens.position[work.tokens.sequence == work.tokens.sequence.bincount().argmax()]
    return None if own_cotangents(traced.losses, candidates[-1].output, position) is None else candidates[-1].name


def _is_causal(work: Workload, structure: Structure, traced: Traced) -> bool:
    whole = head_of(traced.recording, structure).source
    lengths = {1, whole.shape[1] // 2} - {0} if whole.ndim == 3 else set()
    found = [trace_prefix(work, work.longest, length, traced, structure, ()) for length in lengths]
    return bool(found) and all(prefix is not None for prefix in found)


def close(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree well within what is promised of a Gram (1e-9 in float64, 1e-4 in float32)."""
    tolerance = torch.finfo(value.dtype).eps ** 0.7
    return bool(torch.linalg.vector_norm(value - expected) <= tolerance * torch.linalg.vector_norm(expected))
