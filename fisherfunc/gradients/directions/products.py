"""Products with the gradient matrix G without its rows: Gᵀu by weighted backward passes, G x by derivatives along x.

One forward pass a sequence serves all weightings. G x is the forward-mode derivative of the losses; where an operation
of the model has none, the derivative by u of ⟨∇(uᵀℓ), x⟩, which is linear in u; where that does not exist either, it
takes a backward pass a token. All are exact, where they are adjoint to the backward pass, ⟨u, G x⟩ = ⟨Gᵀu, x⟩, which is
tried for each pass: what is detached, rounded with a gradient of its own, or changed by a hook, is different by one way
and the other. Axis order: weights `(k, n)`, trees {name: (k, *shape)}.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad

from fisherfunc.gradients.autodiff.model_function import ordinary
from fisherfunc.gradients.autodiff.pullback import leaves_of
from fisherfunc.gradients.directions.passes import Pass, Passes, pulled, weighted
from fisherfunc.linalg.trees import inner, stacked
from fisherfunc.records.axes import Params
from fisherfunc.runtime.draws import ONE_AT_A_TIME

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
        with ONE_AT_A_TIME, torch.enable_grad(), forward_ad.dual_level():
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


def derivatives_along(passes: Passes, tree: Params, methods: Sequence[str]) -> Float[Tensor, " n"]:
    """G x: the derivative of each loss along a tree, in float64 (computed in the dtype of the model).

    Cost: a forward pass with its derivative a sequence.

    Args:
        passes: Over the rows.
        tree: x.
        methods: By which of `METHODS`, for each pass: `adjoint_methods(passes)`.

    Raises:
        ValueError: If a derivative is not finite.
    """
    params = passes.params
    x = {name: ordinary(tree[name]).to(p) for name, p in params.items()}
    pairs = zip(methods, passes.each, strict=True)
    found = torch.cat([METHODS[method](one, params, x).detach().double() for method, one in pairs])
    if not bool(found.isfinite().all()):
        count = int((~found.isfinite()).sum())
        raise ValueError(
            f"the derivatives of {count} of {len(found)} losses along the tree are not finite; check the tree, and the "
            "dtype of the model"
        )
    rows = torch.cat([one.rows for one in passes.each])
    return torch.empty_like(found).scatter_(0, rows.to(found.device), found)


def by_forward_mode(one: Pass, params: Params, tree: Params) -> Tensor:
    """One Jacobian-vector product; levels of forward mode are those of the process, so that one thread takes it."""
    with ONE_AT_A_TIME:
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


NOT_ADJOINT = (
    "the derivatives of the losses are not adjoint to their backward pass, whichever way they are taken: what goes "
    "back is not linear in what comes from above, as with a hook or a Function that clips or normalises gradients, so "
    "that no matrix G has it as Gᵀu; take that out for this call"
)

METHODS: dict[str, Derivative] = {
    "forward mode": by_forward_mode,
    "double backward": by_double_backward,
    "rows": by_rows,
}


def adjoint_methods(passes: Passes) -> list[str]:
    """The first of `METHODS` that is adjoint to the backward pass, for each pass.

    Cost: a backward pass a sequence, and a derivative, of each method that is tried.

    Raises:
        ValueError: If there is none.
    """
    x = random_tree(passes.params)
    return [_method_of(passes.alone(one), x) for one in passes.each]


def _method_of(passes: Passes, tree: Params) -> str:
    (one,) = passes.each
    u = random_weights(passes.num_rows).to(one.rows.device)
    gradient = next(weighted(one, passes.params, u[None]))
    for name, method in METHODS.items():
        try:
            along = method(one, passes.params, tree)
        except (RuntimeError, NotImplementedError) as error:  # an operation without this derivative
            if name == list(METHODS)[-1] or isinstance(error, torch.OutOfMemoryError):
                raise
            continue
        if is_adjoint(passes, u=u, gradient=gradient, tree=tree, along=along):
            return name
    raise ValueError(NOT_ADJOINT)


def random_tree(params: Params) -> dict[str, Tensor]:
    """A direction with entries of size one, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu").to(p)
        for name, p in params.items()
    }


def random_weights(count: int) -> Float[Tensor, " n"]:
    """Weights of rows, in float64 on the CPU, the same in each call."""
    return torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")


def is_adjoint(
    passes: Passes, *, u: Tensor, gradient: Params, tree: Params, along: Tensor, order: float = 1 / 2
) -> bool:
    """Whether ⟨u, G x⟩ = ⟨Gᵀ u, x⟩ but for round-off, also that of gradients that are zero: eps of the losses.

    As u is drawn without knowing what is wrong, an error e of G x shows as a normal number of size ‖e‖, whatever the
    number of rows: one of 1 % of G x is missed with a chance of a quarter, one as large as G x with 2 in a thousand.

    Derivatives that are not finite count as adjoint: who takes them says so.

    Args:
        passes: Over the rows.
        u: Weights of `random_weights`.
        gradient: Gᵀ u.
        tree: x, with entries of size one.
        along: G x.
        order: G x is known to this power of eps.
    """
    along = along.detach().double()
    if not bool(along.isfinite().all()):
        return True
    with torch.no_grad():
        losses = torch.cat([1 + one.losses(passes.params).detach().double().abs() for one in passes.each])
    error = (u @ along - inner(stacked(gradient), stacked(tree))[0, 0]).abs()
    own = inner(stacked(gradient), stacked(gradient))[0, 0].sqrt()
    eps = torch.finfo(passes.precision).eps
    return bool(error <= 3 * max(eps**order, 1e-3) * along.norm() + 100 * eps * (own + losses.norm() * u.norm()))
