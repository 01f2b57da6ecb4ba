"""From cotangents of one sequence's losses to parameter gradients, for many tokens in one batched backward pass.

One forward pass is shared by all tokens of the sequence; the pullback is batched over cotangents. Three ways, from
the fastest: `torch.func.vjp` under `vmap`; autograd with batched cotangents (a model with its own
`autograd.Function` may need it); a loop of backward passes. All are exact; `choose` takes the first that a probe on
the actual model confirms. Axis order: cotangents `(c, s)`, gradients `{name: (c, *shape)}`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.utils import _pytree as pytree

from fisherfunc.gradients.refusals import REFUSALS
from fisherfunc.records.axes import Params

LossesOf = Callable[[Params], Float[Tensor, " s"]]
Pullback = Callable[[Float[Tensor, "c s"]], dict[str, Tensor]]


def by_vjp(losses_of: LossesOf, params: Params) -> tuple[Tensor, Pullback]:
    """`vmap` over the pullback of one `torch.func.vjp`."""
    losses, pull, *_ = torch.func.vjp(losses_of, dict(params))
    return losses, lambda cotangents: {n: strided(g) for n, g in torch.func.vmap(pull)(cotangents)[0].items()}


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
    cotangents = torch.randn(2, len(losses), generator=generator, device="cpu").to(losses)
    expected = pull(cotangents)
    for name in ("vjp", "autograd"):
        try:
            gradients = METHODS[name](losses_of, params)[1](cotangents)
        except RuntimeError:  # what torch.func raises for a model that it cannot transform: the next way is as exact
            continue
        if _agree(gradients, expected):
            return name
    return "loop"


def check_reach(losses_of: LossesOf, params: Params) -> None:
    """Raise where gradients would silently miss something, or cannot be had. Cost: a forward and a backward pass.

    A parameter that the forward pass reaches past the module's registry (through a Python list, a closure, a patched
    `forward`) cannot be replaced by ours: it stays in the graph as a leaf of its own.

    Args:
        losses_of: Parameters → the losses of one sequence.
        params: Where to differentiate, and by what.

    Raises:
        ValueError: If the losses do not depend on the parameters, or depend on one in such a way, or the backward pass
            fails in evaluation mode.
    """
    leaves = leaves_of(params)
    with torch.enable_grad():
        losses = losses_of(leaves)
    if not losses.requires_grad:
        raise ValueError(
            f"no gradient reaches any of the {len(params)} parameters, such as {next(iter(params))!r}: the losses do "
            "not depend on them; look for torch.no_grad, detach or argmax in the model or the loss"
        )
    for leaf in reached_leaves(losses.grad_fn):
        if isinstance(leaf, nn.Parameter) and leaf.numel():
            names = [repr(name) for name, p in params.items() if p.data_ptr() == leaf.data_ptr()] or ["not named"]
            raise ValueError(
                f"the forward pass reaches a parameter of shape {tuple(leaf.shape)}, {' or '.join(names)}, "
                "past the module's attributes (a Python list, a closure, a cache of its class, a patched forward), so "
                "its gradient would be incomplete; read it as an attribute of a module, or set requires_grad_(False) "
                "on it"
            )
    try:
        torch.autograd.grad(losses.nan_to_num().sum(), list(leaves.values()), allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        raise ValueError(
            f"the backward pass fails in evaluation mode, in which gradients are taken here ({type(error).__name__}: "
            f"{error}); a model that has gradients in training mode alone, as Reformer has, cannot be passed over"
        ) from error


def reached_leaves(node: Any) -> Iterator[Tensor]:
    """The leaves of the graph that ends in a node."""
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)


def _by_graph(losses_of: LossesOf, params: Params, *, batched: bool) -> tuple[Tensor, Pullback]:
    leaves = leaves_of(params)
    with torch.enable_grad():
        losses = losses_of(leaves)

    def one(cotangent: Tensor, *, is_grads_batched: bool) -> dict[str, Tensor]:
        lead = cotangent.shape[:1] if is_grads_batched else ()
        if not losses.requires_grad:  # these parameters are not used
            return {name: p.new_zeros(*lead, *p.shape) for name, p in params.items()}
        gradients = torch.autograd.grad(
            losses,
            list(leaves.values()),
            cotangent,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=is_grads_batched,
        )
        zeros = (
            p.new_zeros(*lead, *p.shape) if g is None else strided(g)
            for p, g in zip(leaves.values(), gradients, strict=True)
        )
        return dict(zip(leaves, zeros, strict=True))

    def together(cotangents: Tensor) -> dict[str, Tensor]:
        return one(cotangents, is_grads_batched=True)

    def in_turn(cotangents: Tensor) -> dict[str, Tensor]:
        return pytree.tree_map(lambda *g: torch.stack(g), *(one(c, is_grads_batched=False) for c in cotangents))

    return losses.detach(), together if batched else in_turn


def leaves_of(params: Params) -> dict[str, Tensor]:
    """The parameters as leaves of a graph of their own, sharing their memory."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def strided(gradient: Tensor) -> Tensor:
    """Embeddings may give sparse gradients."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _agree(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """To the square root of the precision, each parameter, with a floor for round-off: a wrong rule is off by more."""
    errors = torch.stack([vector_norm(gradients[n] - g, dtype=torch.float64) for n, g in expected.items()])
    norms = torch.stack([vector_norm(g, dtype=torch.float64) for g in expected.values()])
    eps = max(torch.finfo(g.dtype).eps for g in expected.values())
    allowed = max(eps**0.5, 1e-3) * norms + 100 * eps * vector_norm(norms)
    return bool((errors <= allowed).all()) or not bool(norms.isfinite().all())
