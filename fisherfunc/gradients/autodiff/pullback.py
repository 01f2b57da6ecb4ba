"""From cotangents of one sequence's losses to parameter gradients, for many tokens in one batched backward pass.

One forward pass is shared by all tokens of the sequence; the pullback is batched over cotangents by `torch.func.vmap`,
or, for a model whose functions cannot be batched, a loop of backward passes. Both are exact; `choose` takes the first
where a probe on the actual model confirms it. Axis order: cotangents `(c, s)`, gradients `{name: (c, *shape)}`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.utils import _pytree as pytree

from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.records.axes import Params

LossesOf = Callable[[Params], Float[Tensor, " s"]]
Pullback = Callable[[Float[Tensor, "c s"]], dict[str, Tensor]]


def by_vmap(losses_of: LossesOf, params: Params) -> tuple[Tensor, Pullback]:
    """One backward pass with batched cotangents."""
    losses, leaves = _graph(losses_of, params)

    def pull(cotangents: Tensor) -> dict[str, Tensor]:
        return gradients_by(leaves, pulled_back([losses], list(leaves.values()), [cotangents]), len(cotangents))

    return losses.detach(), pull


def by_loop(losses_of: LossesOf, params: Params) -> tuple[Tensor, Pullback]:
    """One backward pass a cotangent: the slowest, and what the other is checked against."""
    losses, leaves = _graph(losses_of, params)

    def one(cotangent: Tensor) -> dict[str, Tensor]:
        return gradients_by(leaves, pulled_back([losses], list(leaves.values()), [cotangent[None]]), 1)

    def pull(cotangents: Tensor) -> dict[str, Tensor]:
        return pytree.tree_map(lambda *g: torch.cat(g), *map(one, cotangents))

    return losses.detach(), pull


METHODS: dict[str, Callable[[LossesOf, Params], tuple[Tensor, Pullback]]] = {"vmap": by_vmap, "loop": by_loop}


def choose(losses_of: LossesOf, params: Params) -> str:
    """Choose "vmap" where its gradients agree with ordinary backward passes on two random cotangents.

    Args:
        losses_of: Parameters → the losses of one sequence.
        params: Where to differentiate, and by what.

    Returns:
        A key of `METHODS`.

    Raises:
        ValueError: If a backward pass fails.
    """
    losses, pull = by_loop(losses_of, params)
    generator = torch.Generator().manual_seed(0)
    cotangents = torch.randn(2, len(losses), generator=generator, device="cpu").to(losses)
    try:
        expected = pull(cotangents)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _no_backward(error) from error
    try:
        gradients = by_vmap(losses_of, params)[1](cotangents)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # what torch.func raises for a function that it cannot batch: the loop is as exact
        return "loop"
    return "vmap" if _agree(gradients, expected) else "loop"


def check_reach(losses: Tensor, leaves: Params, known: Params, *, of: str) -> None:
    """Raise where gradients would silently miss something.

    A parameter that the forward pass reaches past the module's registry (through a Python list, a closure, a patched
    `forward`) cannot be replaced by ours: it stays in the graph as a leaf of its own.

    Args:
        losses: In the graph.
        leaves: The parameters, as leaves of the graph.
        known: These and others of the model, as leaves of it.
        of: What was looked at.

    Raises:
        ValueError: If the losses do not depend on the parameters, or depend on one in such a way.
    """
    if not reaches(losses, leaves):
        check_left_behind(losses, leaves)
        raise ValueError(
            f"no gradient reaches any of the {len(leaves)} parameters, such as {next(iter(leaves))!r}: the losses of "
            f"{of} do not depend on them; look for torch.no_grad, detach or argmax in the model or the loss"
        )
    check_left_behind(losses, leaves)
    for leaf in _reached(losses):
        if isinstance(leaf, nn.Parameter) and leaf.numel() and id(leaf) not in set(map(id, known.values())):
            raise _past_attributes(leaf, [])


def reaches(losses: Tensor, leaves: Params) -> bool:
    """Return whether losses depend on any of the parameters.

    Args:
        losses: In the graph.
        leaves: The parameters, as leaves of the graph.
    """
    return not set(map(id, _reached(losses))).isdisjoint(map(id, leaves.values()))


def check_left_behind(losses: Tensor, leaves: Params) -> None:
    """Raise where losses depend on a parameter as another call had it, as what that left in a cache does.

    Args:
        losses: In the graph.
        leaves: The parameters, as leaves of the graph.

    Raises:
        ValueError: If they do.
    """
    ours = set(map(id, leaves.values()))
    for leaf in _reached(losses):
        names = [name for name, p in leaves.items() if id(leaf) not in ours and p.data_ptr() == leaf.data_ptr()]
        if names and leaf.numel():
            raise _past_attributes(leaf, names)


def _reached(losses: Tensor) -> list[Tensor]:
    return list(reached_leaves(losses.grad_fn)) if losses.requires_grad and losses.grad_fn is not None else []


def _past_attributes(leaf: Tensor, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"the forward pass reaches a parameter of shape {tuple(leaf.shape)}, "
        f"{' or '.join(map(repr, names)) or 'not named'}, past the module's attributes (a Python list, a closure, a "
        "cache of its class, a patched forward), so its gradient would be incomplete; read it as an attribute of a "
        "module, or set requires_grad_(False) on it"
    )


def check_backward(losses: Tensor, leaves: Params) -> None:
    """Raise where gradients cannot be had. Cost: a backward pass.

    Args:
        losses: In the graph, which is let go.
        leaves: The parameters, as leaves of the graph.

    Raises:
        ValueError: If the backward pass fails.
    """
    try:
        gradients_of(losses.nan_to_num().sum(), list(leaves.values()))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _no_backward(error) from error


def gradients_of(output: Any, inputs: Sequence[Tensor], given: Any = None, **options: bool) -> tuple[Any, ...]:
    """Call `torch.autograd.grad` for whatever inputs there are; None for those that the output does not depend on.

    Args:
        output: A tensor, or several.
        inputs: Of their graph.
        given: Their cotangents.
        **options: As of that.

    Raises:
        RuntimeError: Whatever a function of the user's raises in the backward pass.
    """
    try:
        return torch.autograd.grad(output, inputs, given, allow_unused=True, **options)
    except RuntimeError:
        raise
    except REFUSALS as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _no_backward(error: Exception) -> ValueError:
    return ValueError(
        f"the backward pass fails in evaluation mode, in which gradients are taken here ({error}); a model that has "
        "gradients in training mode alone, as Reformer has, cannot be passed over"
    )


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


@contextmanager
def no_other_gradients(outputs: Tensor, leaves: Params) -> Iterator[None]:
    """Inside, `.backward()` adds to `.grad` of these leaves alone; that of any other in the graph stays as it is.

    A tensor of the user's that is no parameter, in a closure or the loss, is a leaf too. `inputs=` would not do: by it
    reentrant checkpoints refuse to go backward.
    """
    ours = set(map(id, leaves.values()))
    others = [(leaf, leaf.grad) for leaf in reached_leaves(outputs.grad_fn) if id(leaf) not in ours]
    for leaf, _ in others:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in others:
            leaf.grad = gradient


def _graph(losses_of: LossesOf, params: Params) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = leaves_of(params)
    with torch.enable_grad():
        losses = losses_of(leaves)
    check_left_behind(losses, leaves)
    return losses, leaves


def gradients_by(leaves: Params, found: Sequence[Tensor | None], count: int) -> dict[str, Tensor]:
    """`{name: (c, *shape)}` of what was pulled back to leaves: zero where the outputs do not depend on one."""
    pairs = zip(leaves.items(), found, strict=True)
    return {n: leaf.new_zeros(count, *leaf.shape) if g is None else strided(g) for (n, leaf), g in pairs}


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """Pull many cotangents back at once: `(c, *shape)` for each input; None for what the outputs do not depend on.

    By `torch.func.vmap` over the backward pass, which has batching rules where `is_grads_batched=True` goes row by row
    (layer norm, softmax, tanh and others): a kernel for all rows in place of one each. A single one takes an ordinary
    pass.

    Args:
        outputs: In a graph, which is kept, or without one.
        inputs: Of that graph.
        cotangents: `(c, *shape)` for each output.

    Raises:
        RuntimeError: If a function cannot be batched.
    """
    pairs = [(output, given) for output, given in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    ends = [output for output, _ in pairs]
    reached: list[bool] = []

    def pulled(*one: Tensor) -> list[Tensor]:
        found = gradients_of(ends, inputs, one, retain_graph=True)
        reached[:] = [g is not None for g in found]
        return [g for g in found if g is not None]

    given = [cotangent for _, cotangent in pairs]
    if len(given[0]) == 1:
        found = iter([g[None] for g in pulled(*(g[0] for g in given))])
    else:
        with warnings.catch_warnings():  # of functions that go row by row all the same, such as fused attention
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            found = iter(torch.func.vmap(pulled)(*given))
    return [next(found) if there else None for there in reached]


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
