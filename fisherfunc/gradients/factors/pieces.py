"""From the cotangents of one use of a parameter to its part of the gradients.

Axis order: c slots, b sequences, s places, d features of the output, e of the input, g groups of a convolution.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from fisherfunc.gradients.capture.recording import Use
from fisherfunc.gradients.capture.rules import Convolution, Map, Scale, Shift
from fisherfunc.gradients.capture.structure import close
from fisherfunc.gradients.data.slots import Slots
from fisherfunc.linalg.factors.factors import PointFactors, SharedFactors


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """What factors are kept in: products of float16 numbers overflow at 65,504."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one backward pass gave for one use of one parameter.

    Attributes:
        name: The parameter.
        use: Which of its uses; pieces of one number and sequence share their input.
        rows: The rows of the Gram, one a row of the part; on the CPU where the part has factors that they share.
        part: Factors, or the gradients `(n, p)` themselves.
        first: The first of the rows, where the part has factors that they share.
        sequence: Which sequence of the stack the rows belong to, where the part has factors that they share.
    """

    name: str
    use: int
    rows: Int[Tensor, " n"]
    part: SharedFactors | PointFactors | Float[Tensor, "n p"]
    first: int = 0
    sequence: int = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a linear map of a stack is given, at the places of each sequence.

    Attributes:
        given: Vectors, or ids.
    """

    given: Float[Tensor, "b s e"] | Int[Tensor, "b s"]

    @cached_property
    def kept(self) -> list[tuple[Tensor, Tensor | None]]:
        """Those of each sequence that have a gradient, and their places where these are not all.

        Those of a padding id have none.
        """
        if self.given.is_floating_point() or not bool((self.given < 0).any()):
            return [(inputs, None) for inputs in self.given]
        kept = [(ids >= 0).nonzero().squeeze(-1) for ids in self.given]
        return [(ids[places], places) for ids, places in zip(self.given, kept, strict=True)]

    def begins_with(self, prefix: "Inputs") -> bool:
        """Whether these begin with those of a prefix of each sequence, to within round-off."""
        first, other = self.given[:, : prefix.given.shape[1]], prefix.given
        if first.shape != other.shape:
            return False
        if first.data_ptr() == other.data_ptr() and first.stride() == other.stride():  # a pass over whole sequences
            return True
        return close(other, first) if other.is_floating_point() else torch.equal(other, first)


def num_places(use: Use, width: int) -> int:
    """At how many places of a sequence a linear map or a convolution acts."""
    output = use.output
    return output.numel() // max(features_of(use), 1) // width


def is_lookup(use: Use) -> bool:
    """Whether a use takes rows of the parameter by ids."""
    return isinstance(use.role, Map) and not use.multiplies


def features_of(use: Use) -> int:
    """How many features the cotangent of a use has at a place."""
    if use.output.ndim == 0:
        return 1
    return use.output.shape[1 if isinstance(use.role, Convolution) else -1]


def cotangents_by_place(use: Use, cotangent: Float[Tensor, "c ..."], width: int) -> Float[Tensor, "c b s d"]:
    """The cotangents of the output of a linear map or a convolution."""
    if isinstance(use.role, Convolution):
        return rearrange(cotangent, "c b d ... -> c b (...) d")
    return cotangent.reshape(len(cotangent), width, -1, cotangent.shape[-1])


def inputs_by_place(use: Use, width: int) -> Float[Tensor, "b s e"] | Int[Tensor, "b s"]:
    """The inputs of a linear map, or the patches of a convolution, in the dtype of factors."""
    if isinstance(use.role, Convolution):
        found = patches(use.role)
    else:
        assert isinstance(use.role, Map)
        source = use.role.source.detach()
        if not source.is_floating_point():
            return source.reshape(width, -1)
        found = source.reshape(width, -1, source.shape[-1])
    return found.to(factor_dtype(use.output.dtype))  # the input has another dtype under autocast


def patches(role: Convolution) -> Float[Tensor, "b s e"]:
    """What each output of a convolution is a linear map of: channels, then places of the kernel."""
    image = role.source.detach()
    along = [pad for pads in reversed(role.padding) for pad in pads]
    image = functional.pad(image, along)
    if len(role.kernel) == 1:
        image = image[:, :, None]
    kernel, stride, dilation = ((1, *o)[-2:] for o in (role.kernel, role.stride, role.dilation))
    return functional.unfold(image, kernel, dilation=dilation, stride=stride).mT


def formed(use: Use, cotangent: Tensor, width: int) -> Float[Tensor, "c b p"]:
    """The gradients of a use, a row for each slot and sequence, flattened."""
    role = use.role
    cotangent = cotangent.to(factor_dtype(cotangent.dtype))
    if isinstance(role, Shift):
        return _summed(cotangent, use.output, width, role.shape)
    if isinstance(role, Scale):
        return _summed(cotangent * role.factor().detach().to(cotangent), use.output, width, role.shape)
    own, inputs = cotangents_by_place(use, cotangent, width), inputs_by_place(use, width)
    if isinstance(role, Convolution):
        left = rearrange(own, "c b s (g d) -> c b s g d", g=role.groups)
        right = rearrange(inputs, "b s (g e) -> b s g e", g=role.groups)
        return rearrange(einsum(left, right, "c b s g d, b s g e -> c b g d e"), "c b g d e -> c b (g d e)")
    if inputs.is_floating_point():
        found = einsum(own, inputs, "c b s d, b s e -> c b d e")
    else:
        found = _scattered(own, inputs, use.size // own.shape[-1]).mT
    return rearrange(found if role.axis == 0 else found.mT, "c b i j -> c b (i j)")


def _scattered(own: Float[Tensor, "c b s d"], ids: Int[Tensor, "b s"], num_rows: int) -> Float[Tensor, "c b e d"]:
    """Cotangents added up by id; those of negative ids, which have no gradient, are left out."""
    index = ids[..., None].expand(own.shape)
    there = (index >= 0).to(own.dtype)
    return own.new_zeros(*own.shape[:2], num_rows, own.shape[-1]).scatter_add(2, index.clamp(min=0), own * there)


def _summed(cotangent: Tensor, output: Tensor, width: int, shape: tuple[int, ...]) -> Float[Tensor, "c b p"]:
    """The cotangent of what was broadcast to the output."""
    count = len(cotangent)
    each = cotangent.reshape(count, width, output.shape[0] // width, *output.shape[1:]) if output.ndim else cotangent
    if output.ndim == 0:
        return each.reshape(count, 1, 1)
    ones = (1,) * (output.ndim - len(shape))
    return each.sum_to_size(count, width, *ones, *shape).reshape(count, width, -1)


def pieces_of(
    use: Use, cotangent: Tensor, slots: Slots, *, compact: bool, keep: Mapping[tuple[str, int], Inputs]
) -> list[Piece]:
    """The pieces of one use.

    Args:
        use: The use.
        cotangent: Of its output, with a leading axis of slots.
        slots: The rows of the Gram.
        compact: Whether gradients are to be formed.
        keep: {(parameter, use): the inputs at all places}, to be shared by the pieces of chunks.
    """
    width, rows = slots.width, slots.present
    grouped = isinstance(use.role, Convolution) and use.role.groups > 1
    if compact or grouped or isinstance(use.role, Shift | Scale):
        return [Piece(name=use.name, use=0, rows=rows, part=slots.flat(formed(use, cotangent, width)))]
    own = cotangents_by_place(use, cotangent, width)
    own, inputs = own.to(factor_dtype(own.dtype)), inputs_by_place(use, width)
    axis = use.role.axis if isinstance(use.role, Map) else 0
    if at_one_place(inputs):
        shared = slots.flat(repeat(inputs[:, 0], "b e -> c b e", c=len(own)))
        point = PointFactors(own=slots.flat(own[:, :, 0]), shared=shared.to(own), axis=axis)
        return [Piece(name=use.name, use=use.number, rows=rows, part=point)]
    here = Inputs(given=inputs)
    whole = keep.get((use.name, use.number), here)
    source = whole if whole.begins_with(here) else here
    found = []
    for b, (mine, (_, kept), (shared, _)) in enumerate(zip(slots.by_sequence, here.kept, source.kept, strict=True)):
        cotangents = slots.of_sequence(own, b)
        part = SharedFactors(own=cotangents if kept is None else cotangents[:, kept], shared=shared, axis=axis)
        found.append(Piece(name=use.name, use=use.number, rows=mine, part=part, first=slots.first[b], sequence=b))
    return found


def at_one_place(inputs: Float[Tensor, "b s e"] | Int[Tensor, "b s"]) -> bool:
    """Whether a linear map acts at one place of a sequence: its gradients are single products."""
    return inputs.is_floating_point() and inputs.shape[1] == 1
