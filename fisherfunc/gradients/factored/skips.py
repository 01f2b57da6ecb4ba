"""Modules below the floor of a pass: they are not called again, as all that comes of them is known.

Which they are is seen in one recorded pass. That nothing else of them is needed is not assumed: every pass must come,
where it ends, to the values that the whole model came to (known.py).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = tuple[str, int, int]
"""A call of a torch function that returns one tensor in the graph: the last use before it, a parameter and which use of
it, and how many calls after that. Other calls may come and go with the length of a sequence or its mask."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor that a torch function made.

    Attributes:
        call: Which call it was.
        number: How many calls there were up to it.
        shape: Of the tensor.
        dtype: Of its entries, as `str` gives it.
        num_bytes: Of its entries.
    """

    call: Call
    number: int
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Returned:
    """What a module returned: tensors in the graph, of one dtype.

    Attributes:
        shapes: Of each; None for None.
        dtype: Of all, as `str` gives it.
        alone: Whether it is one tensor, and no tuple.
    """

    shapes: tuple[tuple[int, ...] | None, ...]
    dtype: str
    alone: bool


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """A call of a module inside the model.

    Attributes:
        name: Of the module.
        began: How many modules had begun before it.
        others: How many began inside of it.
        number: How many calls of torch functions there were until it ended.
        call: The last of them.
        uses: {parameter: how many of its uses are inside}.
        returned: What it returned; None where that is something else than tensors in the graph.
    """

    name: str
    began: int
    others: int
    number: int
    call: Call
    uses: Mapping[str, int]
    returned: Returned | None


def returned_by(result: Any) -> Returned | None:
    """What a module returned, where blanks can take its place."""
    values = result if type(result) is tuple else (result,)
    tensors = [value for value in values if isinstance(value, Tensor)]
    dtypes = {str(tensor.dtype) for tensor in tensors}
    if len(dtypes) != 1 or not all(value is None or isinstance(value, Tensor) for value in values):
        return None
    if not all(tensor.requires_grad for tensor in tensors):  # a mask, say: passes above the floor may need it
        return None
    shapes = tuple(None if value is None else tuple(value.shape) for value in values)
    return Returned(shapes=shapes, dtype=dtypes.pop(), alone=result is not values)


def skippable(calls: Iterable[ModuleCall], cut: Made) -> list[ModuleCall]:
    """The calls that end before a cut is made, without those inside of others.

    Only of modules that are called once, and return tensors whose leading axes, of sequences and places, are the cut's.
    """
    calls = sorted(calls, key=lambda one: one.began)
    times = Counter(one.name for one in calls)
    found: list[ModuleCall] = []
    inside = -1  # calls that began up to here are part of the last one found
    for one in calls:
        if one.began > inside and one.number < cut.number and times[one.name] == 1 and _like(one.returned, cut):
            found.append(one)
            inside = one.began + one.others
    return found


def _like(returned: Returned | None, cut: Made) -> bool:
    leading = _leading(len(cut.shape))
    return (
        returned is not None
        and returned.dtype == cut.dtype
        and all(shape is None or shape[:leading] == cut.shape[:leading] for shape in returned.shapes)
    )


def blank(returned: Returned, known: Tensor) -> Any:
    """Zeros in the place of what a module would return, for as many sequences and places as what is known has."""
    leading = known.shape[: _leading(known.ndim)]
    with torch._C.DisableTorchFunction():  # nobody is to see these calls
        zeros = tuple(
            None if shape is None else known.new_zeros((*leading, *shape[len(leading) :])).requires_grad_().clone()
            for shape in returned.shapes
        )
    return zeros[0] if returned.alone else zeros


def _leading(ndim: int) -> int:
    return 2 if ndim > 2 else 1
