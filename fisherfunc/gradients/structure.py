"""What a probe on the actual model finds out before the factored route exploits it; nothing is assumed from a name.

On one sequence: which parameters enter through linear maps only; whether the losses depend on the parameters through
one last linear map, each on its own place of it; whether a shorter sequence gives the same values at its places.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients._taps import Recorder, Recording, Use
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
        losses: `(s,)`, in the graph.
        recording: The uses of the factored parameters.
        leaves: The dense parameters, as leaves of the graph.
    """

    losses: Tensor
    recording: Recording
    leaves: dict[str, Tensor]


def trace(work: Workload, sequence: Batch, structure: Structure, formed: Iterable[str] | None = None) -> Traced:
    """Run one sequence with every use of a factored parameter recorded and the dense ones (or `formed`) as leaves."""
    constants = {name: p.detach() for name, p in work.params.items()}
    leaves = {
        name: work.params[name].detach().requires_grad_() for name in (structure.dense if formed is None else formed)
    }
    recorder = Recorder({name: constants[name] for name in structure.factored}, protected=structure.protected)
    with torch.enable_grad():
        with recorder:
            output = work.fn.apply({**constants, **leaves}, sequence)
        losses = work.loss.values(output, sequence)[0]
    return Traced(losses=losses, recording=recorder.recording, leaves=leaves)


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
    return replace(structure, protected=structure.protected | recording.overwritten())


def formed(structure: Structure, names: Iterable[str], reason: str) -> Structure:
    """The structure with some of the factored parameters among the dense ones."""
    moved = {name: reason for name in names if name in structure.factored}
    structure = replace(structure, factored=structure.factored - set(moved), dense={**structure.dense, **moved})
    return replace(structure, head=None, causal=False) if structure.head in moved else structure


def head_of(recording: Recording, structure: Structure) -> Use:
    """The use of the last linear map."""
    return next(u for u in reversed(recording.uses) if u.name == structure.head and not u.is_bias)


def apart(recording: Recording, structure: Structure) -> tuple[list[Use], list[Use]]:
    """The uses at the last linear map (its weight, its bias), and all others."""
    if structure.head is None:
        return [], list(recording.uses)
    output = head_of(recording, structure).output
    at_head = [use for use in recording.uses if use.output is output]
    return at_head, [use for use in recording.uses if use.output is not output]


def _head(traced: Traced, work: Workload) -> str | None:
    """The last weight use through which all losses go, the loss at place s through place s alone."""
    uses = traced.recording.uses
    candidates = [use for use in uses if not use.is_bias and use.source.is_floating_point()]
    if not candidates or candidates[-1].axis != 0:
        return None
    use, losses = candidates[-1], traced.losses
    places = use.output.numel() // use.output.shape[-1]
    others = [other for other in uses if other.output is not use.output]
    if places < len(losses) or not use.source.requires_grad:
        return None
    weights = torch.linspace(1.0, 2.0, len(losses)).to(losses)
    targets = [use.output, use.source, *(u.output for u in others)]
    plain, *_ = _gradients(losses.sum(), targets[:1])
    weighted, at_source, *below = _gradients(weights @ losses, targets)
    plain, weighted = plain.reshape(places, -1), weighted.reshape(places, -1)
    expected = torch.zeros_like(plain)
    expected[: len(losses)] = weights[:, None].to(plain) * plain[: len(losses)]
    below_head = weighted @ work.params[use.name]
    if not close(weighted, expected) or not close(at_source.reshape(places, -1), below_head):
        return None
    through = _gradients(use.source, targets[2:], at_source)
    return use.name if all(close(t, b) for t, b in zip(through, below, strict=True)) else None


def _is_causal(work: Workload, structure: Structure, traced: Traced) -> bool:
    whole = head_of(traced.recording, structure).source.detach()
    for length in {1, whole.shape[1] // 2} if whole.ndim == 3 else ():
        prefix = shortened(work.longest, length)
        if length < 1 or prefix is None:
            return False
        part = _head_input(work, prefix, structure)
        if part.shape[1] != length or not close(part, whole[:, :length]):
            return False
    return whole.ndim == 3


def _head_input(work: Workload, sequence: Batch, structure: Structure) -> Tensor:
    """The input of the last linear map for one sequence."""
    constants = {name: p.detach() for name, p in work.params.items()}
    recorder = Recorder({name: constants[name] for name in structure.factored}, protected=structure.protected)
    with torch.no_grad(), recorder:
        work.fn.apply(constants, sequence)
    return head_of(recorder.recording, structure).source


def _gradients(output: Tensor, inputs: Sequence[Tensor], cotangent: Any = None) -> list[Tensor]:
    if not inputs:
        return []
    found = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def close(value: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree to the square root of the precision: round-off passes, another value does not."""
    eps = torch.finfo(value.dtype).eps
    error, norm = torch.linalg.vector_norm(value - expected), torch.linalg.vector_norm(expected)
    return bool(error <= max(eps**0.5, 1e-6) * norm)
