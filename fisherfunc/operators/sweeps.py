"""The two sweeps of a product with F: u → Gᵀ u by ordinary backward passes, v → G v by derivatives along v.

The first is a plain call of the model and `.backward()`, so that attention kernels without a second derivative,
checkpointing of activations and compilation stay what they are. The second is the forward-mode derivative of the
losses, or, where an operation has none, a central difference of two plain forward passes, or, where the model's
gradients are not those of its values (a straight-through estimator, a `detach`), a way of directions/products.py:

    (ℓ(θ + h v) − ℓ(θ − h v)) / 2h = G v + O(h²) + O(eps/h),     h = s √n/‖G v‖

so that losses change by s, which is found once by trial: with a step that is not scaled by norms, differences of
float32 losses are round-off along some v, and curvature along others (measured on the embedded model: the best h of a
leading eigenvector is 35 times smaller than that of a random one, whose ‖G v‖ is 27 times smaller). For v = Gᵀ u
‖G v‖ ≥ ‖v‖²/‖u‖ is known; else it is measured on the first pass. Axis order: rows `n`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff.pullback import no_other_gradients, strided
from fisherfunc.gradients.directions.passes import Pass, Passes
from fisherfunc.gradients.directions.products import (
    METHODS,
    NOT_ADJOINT,
    gradient_of_derivatives,
    is_adjoint,
    random_tree,
    random_weights,
    zeros_of,
)
from fisherfunc.linalg.trees import inner, stacked
from fisherfunc.records.axes import Params

FORWARD_MODE = "forward mode"
CENTRAL_DIFFERENCE = "central difference"
AUTO = "auto"
DERIVATIVES = (AUTO, FORWARD_MODE, CENTRAL_DIFFERENCE)
_NOT_SO = "these derivatives are not adjoint to the backward pass; derivative='auto' takes others"
TRIED = range(4, -6, -1)
"""Powers of 4 that eps^⅓ nats are multiplied by in the trial."""


def weighted_gradient(passes: Passes, weights: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """Gᵀ u, by one backward pass of the weighted sum of the losses of each pass.

    Gradients of float32 and wider are summed where autograd sums them, so that one tree is held; narrower ones in
    float32.

    Raises:
        ValueError: If a gradient is not finite.
    """
    totals = zeros_of(passes)
    for one in passes.each:
        leaves, run = one.ordinary(passes.params, list(passes.params))
        in_place = {name: leaf for name, leaf in leaves.items() if leaf.dtype == totals[name].dtype}
        for name, leaf in in_place.items():
            leaf.grad = totals[name]
        with torch.enable_grad():
            losses = run()
            if losses.requires_grad:
                with no_other_gradients(losses, leaves):
                    losses.backward(weights[one.rows].to(losses))
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                totals[name] = leaf.grad if name in in_place else totals[name] + strided(leaf.grad)
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise ValueError(f"a weighted gradient by {name!r} is not finite; check the model's weights and dtype")
    return {name: total.detach() for name, total in totals.items()}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How central differences are taken.

    Attributes:
        change: s, by how much losses are to change, in their unit.
        rate: ‖G v‖/(√n ‖v‖) as it was in the trial, by which a first guess is made.
    """

    change: float
    rate: float


Way = Difference | str
"""How derivatives are taken: by central differences, or by one of `METHODS`."""


def name_of(way: Way) -> str:
    """What a way is called."""
    return CENTRAL_DIFFERENCE if isinstance(way, Difference) else way


def derivatives(passes: Passes, tree: Params, way: Way, *, slope: float | None = None) -> Float[Tensor, " n"]:
    """G v in float64, computed in the dtype of the model.

    Args:
        passes: Over the rows.
        tree: v.
        way: How they are taken.
        slope: ‖G v‖/√n, where it is known.

    Raises:
        ValueError: If a derivative is not finite.
    """
    v = {name: tree[name].to(p) for name, p in passes.params.items()}
    found = torch.zeros(passes.num_rows, dtype=torch.float64, device=next(iter(v.values())).device)
    length = norm(v)
    if length == 0:
        return found
    distance = 0.0
    if isinstance(way, Difference):
        first = passes.each[0]
        guess = way.change / (way.rate * length)
        slope = slope or _root_mean_square(_difference(first, passes.params, v, guess))
        distance = way.change / slope if slope > 0 else guess
    for one in passes.each:
        along = (
            _difference(one, passes.params, v, distance)
            if isinstance(way, Difference)
            else METHODS[way](one, passes.params, v)
        )
        found[one.rows.to(found.device)] = along.detach().double()
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"the derivatives of {int((~found.isfinite()).sum())} of {len(found)} losses are not finite; "
            "check the model's weights and dtype"
        )
    return found


def gradient_along(passes: Passes, tree: Params, way: Way) -> dict[str, Tensor]:
    """Gᵀ G v in two sweeps, where the two cannot be one (`shares_primal`)."""
    return weighted_gradient(passes, derivatives(passes, tree, way))


def shares_primal(passes: Passes) -> bool:
    """Whether one sweep gives Gᵀ G v: on the first pass, held against two. Sparse gradients, for one, do not.

    Cost: ten forward passes of the first pass.
    """
    one = passes.alone(passes.each[0])
    v = weighted_gradient(one, torch.ones(one.num_rows, dtype=torch.float64, device=one.each[0].rows.device))
    expected = gradient_along(one, v, FORWARD_MODE)
    try:
        found = gradient_of_derivatives(one, v)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    eps = max(torch.finfo(p.dtype).eps for p in one.params.values())
    off = norm({name: found[name] - value for name, value in expected.items()})
    return off <= max(eps**0.5, 1e-3) * norm(expected)


def _difference(one: Pass, params: Params, v: Params, distance: float) -> Tensor:
    ends = []
    for sign in (1, -1):
        _, run = one.ordinary({name: p + sign * distance * v[name] for name, p in params.items()}, ())
        with torch.no_grad():
            ends.append(run().double())
    return (ends[0] - ends[1]) / (2 * distance)


def chosen_way(passes: Passes, derivative: str) -> Way:
    """How derivatives are taken: the first way of those asked for that is adjoint to the backward pass, in every pass.

    "auto" asks for forward mode, central differences, second derivatives and a backward pass a row, in this order.
    Cost: a backward pass and a derivative of all rows, of each way that is tried.

    Raises:
        ValueError: If no way is.
    """
    ways: dict[str, Callable[[], Way]] = {name: partial(str, name) for name in METHODS}
    ways = {FORWARD_MODE: ways.pop(FORWARD_MODE), CENTRAL_DIFFERENCE: lambda: tried_difference(passes), **ways}
    for way in ways.values() if derivative == AUTO else [ways[derivative]]:
        if _is_adjoint(passes, found := way()):
            return found
    raise ValueError(NOT_ADJOINT if derivative == AUTO else f"derivative={derivative!r}: {_NOT_SO}")


def tried_difference(passes: Passes) -> Difference:
    """The central difference whose change of the losses a quarter of it alters least, along v = Gᵀu of the first pass.

    Cost: a few passes over the first rows.
    """
    one = passes.alone(first := passes.each[0])
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(one.num_rows, generator=generator, dtype=torch.float64, device="cpu").to(first.rows.device)
    v = weighted_gradient(one, u)
    eps = max(torch.finfo(p.dtype).eps for p in passes.params.values())
    length = norm(v) or 1.0
    slope = length**2 / float(u.norm() * one.num_rows**0.5)
    tried = [Difference(change=eps ** (1 / 3) * 4.0**power, rate=slope / length) for power in TRIED]
    found = [derivatives(one, v, difference, slope=slope) for difference in tried]
    altered = [float((b - a).norm()) for a, b in pairwise(found)]
    return tried[altered.index(min(altered))]


def _root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _is_adjoint(passes: Passes, way: Way) -> bool:
    """Of differences in all rows together: what a step leaves of those that change least is no less than round-off."""
    v, differences = random_tree(passes.params), isinstance(way, Difference)
    for some in [passes] if differences else map(passes.alone, passes.each):
        u = random_weights(some.num_rows).to(some.each[0].rows.device)
        gradient = weighted_gradient(some, u)
        try:
            along = derivatives(some, v, way)
        except (RuntimeError, NotImplementedError) as error:  # an operation without this derivative
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return False
        order = 1 / 3 if differences else 1 / 2
        if not is_adjoint(some, u=u, gradient=gradient, tree=v, along=along, order=order):
            return False
    return True


def norm(tree: Params) -> float:
    """The norm of a tree as one vector."""
    return float(inner(stacked(tree), stacked(tree)).sqrt())
