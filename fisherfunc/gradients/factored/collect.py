"""One sequence of the factored route: what its backward passes give for each parameter, piece by piece.

The output layer is closed form: one backward pass of the summed loss gives every token's row of logit cotangents, and
the batched pass of a chunk of tokens starts below it, at one place a token. Where the probe found the model causal, a
chunk runs on the shortest prefix that holds its tokens. Axis order: c tokens of a chunk, s places, d features.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.factored._taps import Use, factor_dtype
from fisherfunc.gradients.factored.structure import (
    Structure,
    Traced,
    apart,
    close,
    head_of,
    own_cotangents,
    settled,
    trace,
    trace_prefix,
)
from fisherfunc.gradients.rows import one_hot
from fisherfunc.gradients.workload import Workload
from fisherfunc.linalg.factors import PointFactors, SharedFactors


class Unsettled(Exception):  # noqa: N818 (it is no error: the caller starts again with the structure that it carries)
    """A sequence uses a parameter in a way that the structure found on another one does not allow for."""

    def __init__(self, structure: Structure) -> None:
        super().__init__("the sequences use the parameters in different ways")
        self.structure = structure


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one backward pass gave for one use of one parameter.

    Attributes:
        name: The parameter.
        use: Which of its uses, counted from 0; those of one number share their input over all chunks of a sequence.
        rows: The rows of the Gram.
        part: Factors, or the gradients `(c, p)` themselves.
    """

    name: str
    use: int
    rows: slice
    part: SharedFactors | PointFactors | Float[Tensor, "c p"]


def sequence_pieces(
    work: Workload, rows: slice, *, structure: Structure, wanted: frozenset[str], chunk_size: int
) -> Iterator[Piece]:
    """The pieces of the wanted parameters for the tokens `rows`, all of one sequence.

    Raises:
        Unsettled: If the structure does not hold for this sequence.
    """
    tokens = work.tokens
    sequence = work.sequences[int(tokens.sequence[rows.start])]
    formed = [name for name in structure.dense if name in wanted]
    whole = trace(work, sequence, structure, formed)
    changed = settled(structure, whole.recording)
    if changed != structure:
        raise Unsettled(changed)
    inputs = {(u.name, number): _kept(u)[0] for number, u in _numbered(whole.recording.uses) if not u.is_bias}
    chunks = [slice(start, min(start + chunk_size, rows.stop)) for start in range(rows.start, rows.stop, chunk_size)]
    if structure.head is None:
        for chunk in chunks:
            cotangent = one_hot(tokens.position[chunk], whole.losses)
            yield from _pulled(whole, whole.losses, cotangent, whole.recording.uses, chunk, wanted, inputs)
        return
    at_logits = own_cotangents(whole.losses, head_of(whole.recording, structure).output, tokens.position[rows])
    if at_logits is None:
        raise Unsettled(replace(structure, head=None, causal=False))
    yield from _head_pieces(whole, structure, at_logits, tokens.position[rows], rows, wanted)
    below = at_logits @ work.params[head_of(whole.recording, structure).name].detach().to(at_logits.dtype)
    for chunk in chunks:
        place, traced = tokens.position[chunk], whole
        if structure.causal:
            traced = trace_prefix(work, sequence, int(place[-1]) + 1, whole, structure, formed) or whole
        source = head_of(traced.recording, structure).source
        cotangent = _at_places(source, place, below[chunk.start - rows.start : chunk.stop - rows.start])
        _, others = apart(traced.recording, structure)
        yield from _pulled(traced, source, cotangent, others, chunk, wanted, inputs)


def _head_pieces(
    whole: Traced, structure: Structure, at_logits: Tensor, position: Tensor, rows: slice, wanted: frozenset[str]
) -> Iterator[Piece]:
    left = at_logits.to(factor_dtype(at_logits.dtype))
    for use in apart(whole.recording, structure)[0]:
        if use.name in wanted:
            point = at_logits if use.is_bias else PointFactors(left=left, right=use.shared[position])
            yield Piece(name=use.name, use=-1, rows=rows, part=point)


def _pulled(
    traced: Traced,
    output: Tensor,
    cotangent: Tensor,
    uses: Sequence[Use],
    rows: slice,
    wanted: frozenset[str],
    inputs: Mapping[tuple[str, int], Tensor],
) -> Iterator[Piece]:
    """One batched backward pass from `output` to the outputs of the wanted uses and to the leaves."""
    pulled = {id(use) for use in uses if use.name in wanted}
    numbered = [(number, use) for number, use in _numbered(traced.recording.uses) if id(use) in pulled]
    outputs = list({id(use.output): use.output for _, use in numbered}.values())
    targets = [*outputs, *traced.leaves.values()]
    if not targets or not output.requires_grad:
        return
    found = torch.autograd.grad(output, targets, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=True)
    count = len(cotangent)
    own = {
        id(o): o.new_zeros(count, o[..., 0].numel(), o.shape[-1]) if g is None else rearrange(g, "c ... d -> c (...) d")
        for o, g in zip(outputs, found, strict=False)
    }
    biases: dict[str, list[Tensor]] = defaultdict(list)
    for number, use in numbered:
        if use.is_bias:
            biases[use.name].append(own[id(use.output)].sum(dim=1))
        else:
            part = _factors(use, own[id(use.output)], inputs.get((use.name, number)))
            yield Piece(name=use.name, use=number, rows=rows, part=part)
    for name, values in biases.items():
        yield Piece(name=name, use=0, rows=rows, part=torch.stack(values).sum(dim=0))
    for name, gradient in zip(traced.leaves, found[len(outputs) :], strict=True):
        if gradient is not None:
            strided = gradient.to_dense() if gradient.is_sparse else gradient
            yield Piece(name=name, use=0, rows=rows, part=strided.reshape(count, -1))


def _numbered(uses: Sequence[Use]) -> Iterator[tuple[int, Use]]:
    """Each use with how many uses of the same parameter came before it."""
    seen: Counter[str] = Counter()
    for use in uses:
        yield seen[use.name], use
        seen[use.name] += 1


def _factors(use: Use, own: Tensor, whole: Tensor | None) -> SharedFactors | PointFactors:
    """Factors; their input is that of the whole sequence, one tensor for all chunks, where it begins with theirs."""
    shared, kept = _kept(use)
    own = (own if kept is None else own[:, kept]).to(factor_dtype(own.dtype))
    if len(shared) == 1 and shared.is_floating_point():
        left, right = own[:, 0], shared.expand(len(own), -1).to(own)
        return PointFactors(left=left, right=right) if use.axis == 0 else PointFactors(left=right, right=left)
    if whole is not None and _begins_with(whole, shared, use.output.dtype):
        shared = whole
    return SharedFactors(own=own, shared=shared, axis=use.axis)


def _begins_with(whole: Tensor, shared: Tensor, dtype: torch.dtype) -> bool:
    first = whole[: len(shared)]
    if first.shape != shared.shape or first.dtype != shared.dtype:
        return False
    return close(shared.to(dtype), first.to(dtype)) if shared.is_floating_point() else torch.equal(shared, first)


def _kept(use: Use) -> tuple[Tensor, Tensor | None]:
    """The input of a use and the places that it has left: those of a padding id have no gradient."""
    shared = use.shared
    if shared.is_floating_point() or not bool((shared < 0).any()):
        return shared, None
    kept = (shared >= 0).nonzero().squeeze(-1)
    return shared[kept], kept


def _at_places(source: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Cotangents `(c, *source)` that are zero but for each token's values at its own place."""
    cotangent = source.new_zeros(len(place), source[..., 0].numel(), source.shape[-1])
    cotangent[torch.arange(len(place), device=source.device), place] = values
    return cotangent.reshape(len(place), *source.shape)
