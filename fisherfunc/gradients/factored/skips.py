"""Modules below the floor of a pass: they are not called again, as all that comes of them is known.

Which they are is seen in one recorded pass. That nothing else of them is needed is not assumed: what they would return
is NaN, and every pass must come, where it ends, to the values that the whole model came to (known.py).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.factored.calls import Call, Made, kind_of


@dataclass(frozen=True, kw_only=True)
class Returned:
    """What a module returned: tensors in the graph, of one kind.

    Attributes:
        shapes: Of each; None for None.
        kind: Of their entries, and where these are.
        alone: Whether it is one tensor, and no tuple.
    """

    shapes: tuple[tuple[int, ...] | None, ...]
    kind: str
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
    """What a module returned, where something else can take its place."""
    values = result if type(result) is tuple else (result,)
    tensors = [value for value in values if isinstance(value, Tensor)]
    kinds = set(map(kind_of, tensors))
    if len(kinds) != 1 or not all(value is None or isinstance(value, Tensor) for value in values):
        return None
    if not all(tensor.requires_grad for tensor in tensors):  # a mask, say: passes above the floor may need it
        return None
    shapes = tuple(None if value is None else tuple(value.shape) for value in values)
    return Returned(shapes=shapes, kind=kinds.pop(), alone=result is not values)


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
        and returned.kind == cut.kind
        and all(
            shape is None or (shape[:leading] == cut.shape[:leading] and _leading(len(shape)) == leading)
            for shape in returned.shapes
        )
    )


def instead_of(returned: Returned, known: Tensor) -> Any:
    """NaN in the place of what a module would return, for as many sequences and places as what is known has."""
    leading = known.shape[: _leading(known.ndim)]
    with torch._C.DisableTorchFunction():  # nobody is to see these calls
        found = tuple(
            None if shape is None else known.new_full((*leading, *shape[len(leading) :]), nan).requires_grad_().clone()
            for shape in returned.shapes
        )
    return found[0] if returned.alone else found


def _leading(ndim: int) -> int:
    """How many axes are of sequences and places: of samples without places there is one."""
    return 2 if ndim > 2 else 1
