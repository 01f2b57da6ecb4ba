"""Whether sequences that run together are separate: in their values, and in their gradients.

Every stack is tested, as what a model does may depend on the data. Values, where nothing else tests them: the stack is
cut into parts at random, which run without each other. Gradients: a random cotangent is multiplied by a power of two a
sequence, which is exact in floating point; where sequences are separate, so are all cotangents below. Axis order: b
sequences, then all else.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfunc.gradients.factored.powers import random_powers
from fisherfunc.gradients.factored.structure import Structure, Traced, apart, head_of, trace_part, vectors
from fisherfunc.gradients.stacks import Stack
from fisherfunc.gradients.workload import Workload

PARTS = 8
"""At most how many parts run without each other: two sequences that meet are parted with probability 7/8 or more."""
LARGEST_POWER = 30
"""Two sequences that meet have the same power and sign with a probability of 1/122."""
SMALL_POWER = 3
"""For a dtype of a narrower range than bfloat16 and float32 have."""
WIDE = 2.0**100


def sequences_apart(work: Workload, stack: Stack, structure: Structure, whole: Traced) -> bool:
    """Return whether no sequence of a stack reaches another, as far as random parts and random weights show.

    Values are tested where nothing else is: the survey has seen those of the losses, and where each sequence is meant
    alone, the check of the Grams runs it alone. Gradients always are: in the same company that check has the same.

    Cost: two ordinary backward passes of the stack; a forward pass of all sequences where values are tested.

    Args:
        work: What is passed over.
        stack: Of its sequences.
        structure: What is exploited.
        whole: The pass over the stack.
    """
    generator = torch.Generator().manual_seed(stack.members[0])
    at_end = structure.head is not None
    together = vectors(head_of(whole.recording, structure)) if at_end else whole.losses
    if together.numel() % stack.width or (
        structure.tested and not _values_apart(work, stack, structure, together.detach(), generator)
    ):
        return False
    return _gradients_apart(together, whole, structure, stack.width, generator)


def _values_apart(
    work: Workload, stack: Stack, structure: Structure, together: Tensor, generator: torch.Generator
) -> bool:
    values = together.reshape(stack.width, -1)
    order = torch.randperm(stack.width, generator=generator, device="cpu")
    for part in order.tensor_split(min(PARTS, stack.width)):
        found = trace_part(work, [stack.members[b] for b in part.tolist()], structure)
        alone = found.losses if found.recording.end is None else found.recording.end
        ends_alike = (found.recording.end is None) == (structure.head is None)
        if not ends_alike or alone.numel() != values[0].numel() * len(part):
            return False
        if not bool(_rows_close(alone.detach().reshape(len(part), -1), values[part.to(values.device)]).all()):
            return False
    return True


def _gradients_apart(
    together: Tensor, whole: Traced, structure: Structure, width: int, generator: torch.Generator
) -> bool:
    outputs = list({id(use.output): use.output for use in apart(whole.recording, structure)[1]}.values())
    if not outputs or not together.requires_grad:
        return True
    if any(output.ndim == 0 or output.shape[0] % width for output in outputs):
        return False
    # Far from 0, or what leaves a sequence would not be seen.
    of_sequence = 1 + torch.rand(width, generator=generator, device="cpu")
    of_entry = torch.randn(together.numel() // width, generator=generator, device="cpu")
    probe = torch.outer(of_sequence, of_entry).to(together)
    largest = LARGEST_POWER if torch.finfo(together.dtype).max > WIDE else SMALL_POWER
    weights = random_powers((width,), range(-largest, largest + 1), generator).to(together)
    cotangents = [c.reshape(together.shape) for c in (probe, probe * weights[:, None])]
    plain, scaled = (
        torch.autograd.grad(together, outputs, cotangent, retain_graph=True, allow_unused=True)
        for cotangent in cotangents
    )
    scales = [
        _rows_close(other.reshape(width, -1) / weights.to(other)[:, None], one.reshape(width, -1)).all()
        for one, other in zip(plain, scaled, strict=True)
        if one is not None and other is not None
    ]
    return bool(torch.stack([held.to(together.device) for held in scales]).all()) if scales else True


def _rows_close(values: Float[Tensor, "b p"], expected: Float[Tensor, "b p"]) -> Bool[Tensor, " b"]:
    """Sequence by sequence, with a floor for those that are all but zero."""
    tolerance = torch.finfo(values.dtype).eps ** 0.7
    sizes = torch.linalg.vector_norm(expected, dim=1)
    return torch.linalg.vector_norm(values - expected, dim=1) <= tolerance * (sizes + sizes.mean())
