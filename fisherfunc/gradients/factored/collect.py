"""One sequence of the factored route: what its backward passes give for each parameter, piece by piece.

The output layer is closed form: one backward pass of the summed loss gives every token's row of logit cotangents, and
the batched pass of a chunk of tokens starts below it, at one place a token. Where the probe found the model causal, a
chunk runs on the shortest prefix that holds its tokens. Axis order: c tokens of a chunk, s places, d features.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from fisherfunc.gradients.pullback import strided
from fisherfunc.gradients.rows import one_hot
from fisherfunc.gradients.workload import Workload
from fisherfunc.linalg.factors import PointFactors, SharedFactors
from fisherfunc.records.axes import Batch


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
    sequence = work.sequences[int(work.tokens.sequence[rows.start])]
    formed = [name for name in structure.dense if name in wanted]
    whole = trace(work, sequence, structure, formed)
    changed = settled(structure, whole.recording)
    if changed != structure:
        raise Unsettled(changed)
    inputs = {(u.name, number): _kept(u)[0] for number, u in _numbered(whole.recording.uses) if not u.is_bias}
    position = work.tokens.position[rows]
    if structure.head is None:
        starts = _at_losses(whole, position.split(chunk_size))
    else:
        at_logits = _at_logits(whole, structure, position)
        yield from _head_pieces(whole, structure, at_logits, position, rows, wanted)
        below = at_logits @ work.params[structure.head].detach().to(at_logits.dtype)
        places = position.split(chunk_size)
        traces = (_covering(work, sequence, whole, structure, formed, chunk) for chunk in places)
        starts = _below_head(traces, structure, places, below.split(chunk_size))
    first = rows.start
    for start in starts:
        last = first + len(start.cotangent)
        yield from _pulled(start, slice(first, last), wanted, inputs)
        first = last


@dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a batched backward pass starts: the forward pass, the output, its cotangents, and the uses below it."""

    traced: Traced
    output: Tensor
    cotangent: Tensor
    uses: Sequence[Use]


def _at_losses(whole: Traced, chunks: Iterable[Tensor]) -> Iterator[_Start]:
    """At the losses themselves, over the whole sequence."""
    for places in chunks:
        cotangent = one_hot(places, whole.losses)
        yield _Start(traced=whole, output=whole.losses, cotangent=cotangent, uses=whole.recording.uses)


def _below_head(
    traces: Iterable[Traced], structure: Structure, chunks: Iterable[Tensor], values: Iterable[Tensor]
) -> Iterator[_Start]:
    """At the input of the output layer, at one place a token."""
    for traced, places, own in zip(traces, chunks, values, strict=True):
        source = head_of(traced.recording, structure).source
        below = apart(traced.recording, structure)[1]
        yield _Start(traced=traced, output=source, cotangent=_at_places(source, places, own), uses=below)


def _covering(
    work: Workload, sequence: Batch, whole: Traced, structure: Structure, formed: Sequence[str], places: Tensor
) -> Traced:
    """A pass over the shortest prefix that holds the places, of a causal model; else the whole sequence's."""
    if not structure.causal:
        return whole
    return trace_prefix(work, sequence, int(places[-1]) + 1, whole, structure, formed) or whole


def _at_logits(whole: Traced, structure: Structure, position: Tensor) -> Float[Tensor, "n v"]:
    """The cotangents of the logits, each token's at its own place.

    Raises:
        Unsettled: If a loss of this sequence depends on more than its own place, or on the parameters otherwise.
    """
    found = own_cotangents(whole.losses, head_of(whole.recording, structure).output, position)
    if found is None:
        raise Unsettled(replace(structure, head=None, causal=False))
    return found


def _head_pieces(
    whole: Traced, structure: Structure, at_logits: Tensor, position: Tensor, rows: slice, wanted: frozenset[str]
) -> Iterator[Piece]:
    left = at_logits.to(factor_dtype(at_logits.dtype))
    for use in apart(whole.recording, structure)[0]:
        if use.name in wanted:
            point = at_logits if use.is_bias else PointFactors(left=left, right=use.shared[position])
            yield Piece(name=use.name, use=-1, rows=rows, part=point)


def _pulled(
    start: _Start, rows: slice, wanted: frozenset[str], inputs: Mapping[tuple[str, int], Tensor]
) -> Iterator[Piece]:
    """One batched backward pass to the outputs of the wanted uses and to the leaves."""
    leaves = start.traced.leaves
    pulled = {id(use) for use in start.uses if use.name in wanted}
    numbered = [(number, use) for number, use in _numbered(start.traced.recording.uses) if id(use) in pulled]
    outputs = list({id(use.output): use.output for _, use in numbered}.values())
    targets = [*outputs, *leaves.values()]
    if not targets or not start.output.requires_grad:
        return
    found = torch.autograd.grad(
        start.output, targets, start.cotangent, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    own = {id(o): _by_place(o, g, rows.stop - rows.start) for o, g in zip(outputs, found, strict=False)}
    biases: dict[str, list[Tensor]] = defaultdict(list)
    for number, use in numbered:
        if use.is_bias:
            biases[use.name].append(own[id(use.output)].sum(dim=1))
        else:
            part = _factors(use, own[id(use.output)], inputs.get((use.name, number)))
            yield Piece(name=use.name, use=number, rows=rows, part=part)
    for name, values in biases.items():
        yield Piece(name=name, use=0, rows=rows, part=torch.stack(values).sum(dim=0))
    for name, gradient in zip(leaves, found[len(outputs) :], strict=True):
        if gradient is not None:
            yield Piece(name=name, use=0, rows=rows, part=strided(gradient).reshape(len(gradient), -1))


def _by_place(output: Tensor, gradient: Tensor | None, count: int) -> Float[Tensor, "c s d"]:
    """The cotangents of an output with its leading axes flattened to places; zero where none arrive."""
    if gradient is None:
        return output.new_zeros(count, output[..., 0].numel(), output.shape[-1])
    return rearrange(gradient, "c ... d -> c (...) d")


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
