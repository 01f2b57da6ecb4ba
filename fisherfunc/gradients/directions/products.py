"""Products with the gradient matrix G without its rows: Gᵀu by weighted backward passes, G x by derivatives along x.

One forward pass a sequence serves all weightings. G x is the forward-mode derivative of the losses; where an operation
of the model has none, the derivative by u of ⟨∇(uᵀℓ), x⟩, which is linear in u; where that does not exist either, it
takes a backward pass a token. All are exact. Axis order: weights `(k, n)`, trees {name: (k, *shape)}.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from fisherfunc.gradients.autodiff.model_function import ordinary
from fisherfunc.gradients.autodiff.pullback import leaves_of
from fisherfunc.gradients.directions.passes import Pass, Passes, pulled, weighted
from fisherfunc.linalg.trees import inner, stacked
from fisherfunc.records.axes import Params

Derivative = Callable[[Pass, Params, Params], Tensor]
"""(pass, parameters, direction) → the derivatives of the losses of its rows."""


def weighted_gradients(passes: Passes, weights: Float[Tensor, "k n"]) -> dict[str, Tensor]:
    """Gᵀ uᵀ for each row u of the weights: {name: (k, *shape)}, in the dtype of the parameters, or float32 if narrower.

    Cost: a forward pass a sequence, a backward pass a sequence and weighting; k trees are held, and a gradient.

    Raises:
        ValueError: If a result is not finite.
    """
    totals = {
        name: torch.zeros(len(weights), *p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for name, p in passes.params.items()
    }
    for one in passes.each:
        for row, gradient in enumerate(weighted(one, passes.params, weights[:, one.rows])):
            for name, g in gradient.items():
                totals[name][row] += g
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise ValueError(f"a weighted gradient by {name!r} is not finite; check the model's weights and dtype")
    return totals


def gradient_of_derivatives(passes: Passes, tree: Params) -> dict[str, Tensor]:
    """Gᵀ G x in one sweep: the forward pass that carries the derivatives along x is the one that is differentiated.

    Cost: five forward passes a sequence, what is saved for a backward pass twice.

    Raises:
        RuntimeError: If an operation of the model has no forward-mode derivative.
    """
    totals = zeros_of(passes)
    leaves = leaves_of(passes.params)
    for one in passes.each:
        with torch.enable_grad(), forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(leaf, tree[name].to(leaf)) for name, leaf in leaves.items()}
            losses, along = forward_ad.unpack_dual(one.losses(dual))
        along = torch.zeros_like(losses) if along is None else along.detach()
        for name, gradient in pulled(losses, leaves, along).items():
            totals[name] += gradient
    return totals


def zeros_of(passes: Passes) -> dict[str, Tensor]:
    """What gradients are summed in: the dtype of the parameters, or float32 where that is narrower."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in passes.params.items()
    }


def derivatives_along(passes: Passes, tree: Params) -> Float[Tensor, " n"]:
    """G x: the derivative of each loss along a tree, in float64 (computed in the dtype of the model).

    Cost: a forward pass with its derivative a sequence, and a backward pass of the first one, by which the method is
    chosen: the first of `METHODS` for which ⟨u, G x⟩ = ⟨Gᵀ u, x⟩ with random u.

    Raises:
        ValueError: If a derivative is not finite.
    """
    params = passes.params
    x = {name: ordinary(tree[name]).to(p) for name, p in params.items()}
    method = _choose(passes.each[0], params, x)
    found = torch.cat([_derived(method, one, params, x).double() for one in passes.each])
    if not bool(found.isfinite().all()):
        count = int((~found.isfinite()).sum())
        raise ValueError(
            f"the derivatives of {count} of {len(found)} losses along the tree are not finite; check the tree, and the "
            "dtype of the model"
        )
    rows = torch.cat([one.rows for one in passes.each])
    return torch.empty_like(found).scatter_(0, rows.to(found.device), found)


def by_forward_mode(one: Pass, params: Params, tree: Params) -> Tensor:
    """One Jacobian-vector product."""
    return torch.func.jvp(one.losses, (dict(params),), (dict(tree),))[1]


def by_double_backward(one: Pass, params: Params, tree: Params) -> Tensor:
    """The gradient by u of ⟨∇(uᵀℓ), x⟩, at u = 0."""
    leaves = leaves_of(params)
    with torch.enable_grad():
        losses = one.losses(leaves)
        cotangent = torch.zeros_like(losses, requires_grad=True)
        gradients = pulled(losses, leaves, cotangent, create_graph=True)
        along = sum(((g * tree[name]).sum() for name, g in gradients.items()), start=cotangent.sum() * 0)
        return torch.autograd.grad(along, cotangent)[0]


def by_rows(one: Pass, params: Params, tree: Params) -> Tensor:
    """⟨g_n, x⟩, a backward pass a token."""
    x = stacked(tree)
    each = torch.eye(len(one.rows), device=one.rows.device)
    return torch.cat([inner(stacked(g), x)[0] for g in weighted(one, params, each)])


METHODS: dict[str, Derivative] = {
    "forward mode": by_forward_mode,
    "double backward": by_double_backward,
    "rows": by_rows,
}


def _derived(method: str, one: Pass, params: Params, tree: Params) -> Tensor:
    """The derivatives by the first method, from a given one on, that this pass takes."""
    methods = list(METHODS)
    for name in methods[methods.index(method) :]:
        try:
            return METHODS[name](one, params, tree).detach()
        except RuntimeError:  # an operation without such a derivative; the last method is ordinary autograd
            if name == methods[-1]:
                raise
    raise AssertionError("the last method either returns or raises")


def _choose(one: Pass, params: Params, tree: Params) -> str:
    """The first method whose derivatives have the inner product with random u that a backward pass gives."""
    u = torch.randn(1, len(one.rows), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    gradient, x = stacked(next(weighted(one, params, u.to(one.rows.device)))), stacked(tree)
    expected, size = inner(gradient, x).item(), (inner(gradient, gradient) * inner(x, x)).sqrt().item()
    eps = max(torch.finfo(p.dtype).eps for p in params.values())
    *tried, last = METHODS
    for name in tried:
        try:
            along = METHODS[name](one, params, tree).detach().double().cpu()
        except RuntimeError:  # the next method is as exact
            continue
        error = abs((u[0] @ along).item() - expected)
        allowed = max(eps**0.5, 1e-3) * (along.norm() * u.norm()).item() + 100 * eps * size
        if error <= allowed or not bool(along.isfinite().all()):
            return name
    return last
