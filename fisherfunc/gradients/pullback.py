"""From cotangents of one sequence's losses to parameter gradients, for many tokens in one batched backward pass.

One forward pass is shared by all tokens of the sequence; the pullback is batched over cotangents. Three ways, from
the fastest: `torch.func.vjp` under `vmap`; autograd with batched cotangents (a model with its own
`autograd.Function` may need it); a loop of backward passes. All are exact; `choose` takes the first that a probe on
the actual model confirms. Axis order: cotangents `(c, s)`, gradients `{name: (c, *shape)}`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from fisherfunc.records.axes import Params

LossesOf = Callable[[Params], Float[Tensor, " s"]]
Pullback = Callable[[Float[Tensor, "c s"]], dict[str, Tensor]]


def by_vjp(losses_of: LossesOf, params: Params) -> tuple[Tensor, Pullback]:
    """`vmap` over the pullback of one `torch.func.vjp`."""
    losses, pull, *_ = torch.func.vjp(losses_of, dict(params))
    return losses, lambda cotangents: torch.func.vmap(pull)(cotangents)[0]


def by_autograd(losses_of: LossesOf, params: Params) -> tuple[Tensor, Pullback]:
    """One `torch.autograd.grad` with batched cotangents."""
    return _by_graph(losses_of, params, batched=True)


def by_loop(losses_of: LossesOf, params: Params) -> tuple[Tensor, Pullback]:
    """One backward pass a cotangent: the slowest, and what the others are checked against."""
    return _by_graph(losses_of, params, batched=False)


METHODS: dict[str, Callable[[LossesOf, Params], tuple[Tensor, Pullback]]] = {
    "vjp": by_vjp,
    "autograd": by_autograd,
    "loop": by_loop,
}


def choose(losses_of: LossesOf, params: Params) -> str:
    """The first method whose gradients agree with ordinary backward passes on two random cotangents.

    Args:
        losses_of: Parameters → the losses of one sequence.
        params: Where to differentiate, and by what.

    Returns:
        A key of `METHODS`; "loop" where neither batched method will do.
    """
    losses, pull = by_loop(losses_of, params)
    generator = torch.Generator().manual_seed(0)
    cotangents = torch.randn(2, len(losses), generator=generator).to(losses)
    expected = pull(cotangents)
    for name in ("vjp", "autograd"):
        try:
            gradients = METHODS[name](losses_of, params)[1](cotangents)
        except RuntimeError:  # what torch.func raises for a model that it cannot transform: the next way is as exact
            continue
        if _agree(gradients, expected):
            return name
    return "loop"


def _by_graph(losses_of: LossesOf, params: Params, *, batched: bool) -> tuple[Tensor, Pullback]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        losses = losses_of(leaves)

    def one(cotangent: Tensor, *, is_grads_batched: bool) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(
            losses,
            list(leaves.values()),
            cotangent,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=is_grads_batched,
        )
        lead = cotangent.shape[:1] if is_grads_batched else ()
        zeros = (
            p.new_zeros(*lead, *p.shape) if g is None else g for p, g in zip(leaves.values(), gradients, strict=True)
        )
        return dict(zip(leaves, zeros, strict=True))

    def together(cotangents: Tensor) -> dict[str, Tensor]:
        return one(cotangents, is_grads_batched=True)

    def in_turn(cotangents: Tensor) -> dict[str, Tensor]:
        return pytree.tree_map(lambda *g: torch.stack(g), *(one(c, is_grads_batched=False) for c in cotangents))

    return losses.detach(), together if batched else in_turn


def _agree(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """To the square root of the precision over all parameters: a wrong rule is off by percents."""
    errors = torch.stack([(gradients[n] - g).double().square().sum() for n, g in expected.items()]).sum().sqrt()
    norm = torch.stack([g.double().square().sum() for g in expected.values()]).sum().sqrt()
    eps = torch.finfo(next(iter(expected.values())).dtype).eps
    return bool(errors <= max(eps**0.5, 1e-3) * norm) or not bool(norm.isfinite())
