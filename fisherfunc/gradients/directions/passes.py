"""The passes over all rows of a workload: a sequence each, or many small ones of one shape together.

Sequences run together only where that is seen to change nothing: their losses, and a random combination of their
gradients, are those of random parts of the group that run without each other. Axis order: rows `n`, in any order.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.gradients.autodiff.nature import coarsest
from fisherfunc.gradients.autodiff.pullback import LossesOf, leaves_of, strided
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.rows.gradient_rows import runs
from fisherfunc.gradients.rows.stacks import neighbours
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.trees import inner, stacked
from fisherfunc.records.axes import Params

MOST_TOGETHER = 1024
FEWEST_TOGETHER = 16
BYTES_TOGETHER = 2**27
PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass, and which rows it gives.

    Attributes:
        losses: Parameters → the losses of these rows.
        ordinary: (parameters, the names of some) → these as leaves, and one plain call of a fresh copy of the model
            that gives the losses: as a user would, with the attention, checkpointing and compilation that it has.
        rows: Which rows they are.
    """

    losses: LossesOf
    ordinary: Callable[[Params, Collection[str]], tuple[dict[str, Tensor], Callable[[], Tensor]]]
    rows: Int[Tensor, " m"]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """All rows, each in one pass.

    Attributes:
        params: Where to differentiate, and by what.
        each: The passes.
        num_rows: How many rows there are.
        precision: The coarsest dtype in which something is computed.
    """

    params: Params
    each: tuple[Pass, ...]
    num_rows: int
    precision: torch.dtype

    def alone(self, one: Pass) -> "Passes":
        """One of the passes, with its rows numbered from zero."""
        rows = torch.arange(len(one.rows), device=one.rows.device)
        return replace(self, each=(replace(one, rows=rows),), num_rows=len(rows))


def passes_of(work: Workload) -> Passes:
    """The passes over a workload, whose rows may be in any order.

    Cost: nothing; where sequences may run together, two forward and backward passes of all.
    """
    return passes_over(work, groups_of(work))


def groups_of(work: Workload) -> list[list[int]]:
    """The sequences that run together, by their numbers (see `passes_of`)."""
    rows, found = _rows(work), list[list[int]]()
    for group in neighbours(rows, work.sequences, _width(work)):
        together = len(group) >= FEWEST_TOGETHER and _separate(work, group, rows)
        found += [group] if together else [[member] for member in group]
    return found


def passes_over(work: Workload, groups: Sequence[Sequence[int]]) -> Passes:
    """The passes over a workload whose groups are known, as of the same one in another dtype."""
    rows = _rows(work)
    return Passes(
        params=work.params,
        each=tuple(_pass(work, group, rows) for group in groups),
        num_rows=work.num_tokens,
        precision=coarsest(work.nature.precision, *(p.dtype for p in work.params.values())),
    )


def _rows(work: Workload) -> dict[int, Tensor]:
    """{sequence: its rows}."""
    order = work.tokens.sequence.argsort(stable=True)
    return {int(work.tokens.sequence[order[i]]): order[i:j] for i, j in runs(work.tokens.sequence[order])}


def weighted(one: Pass, params: Params, weights: Float[Tensor, "k m"]) -> Iterator[dict[str, Tensor]]:
    """∇(uᵀℓ) for each weighting u of the rows of a pass, from one forward pass."""
    leaves = leaves_of(params)
    with torch.enable_grad():
        losses = one.losses(leaves)
    for u in weights:
        yield pulled(losses, leaves, u.to(losses), retain_graph=True)


def pulled(losses: Tensor, leaves: dict[str, Tensor], cotangent: Tensor, **options: bool) -> dict[str, Tensor]:
    """The gradient by the leaves of the losses times a cotangent; zero for a leaf that is not used."""
    if not losses.requires_grad:
        return {name: torch.zeros_like(p) for name, p in leaves.items()}
    gradients = torch.autograd.grad(losses, list(leaves.values()), cotangent, allow_unused=True, **options)
    pairs = zip(leaves.items(), gradients, strict=True)
    return {name: torch.zeros_like(p) if g is None else strided(g) for (name, p), g in pairs}


def _pass(work: Workload, group: Sequence[int], rows: Mapping[int, Tensor]) -> Pass:
    chosen = torch.cat([rows[member] for member in group])
    place = torch.cat([torch.full_like(rows[member], index) for index, member in enumerate(group)])
    entry = work.tokens.entry[chosen]
    batch = work.sequences.joined(group)

    def losses(some: Params) -> Tensor:
        return work.loss.values(work.fn.apply({**work.params, **some}, batch), batch)[place, entry]

    def ordinary(some: Params, wanted: Collection[str]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        leaves, run = work.fn.ordinary_call({**work.params, **some}, wanted)
        return leaves, lambda: work.loss.values(run(batch), batch)[place, entry]

    return Pass(losses=losses, ordinary=ordinary, rows=chosen)


def _width(work: Workload) -> int:
    """How many sequences are held together, by what the largest saves for its backward pass."""
    return max(1, min(MOST_TOGETHER, BYTES_TOGETHER // max(work.nature.saved_bytes, 1)))


def _separate(work: Workload, group: Sequence[int], rows: Mapping[int, Tensor]) -> bool:
    """Whether losses and a random combination of gradients are those of random parts of a group."""
    generator = torch.Generator().manual_seed(group[0])
    u = torch.randn(1, work.num_tokens, generator=generator, dtype=torch.float64, device="cpu")
    u = u.to(work.tokens.position.device)
    order = torch.randperm(len(group), generator=generator, device="cpu")
    parts = [[group[index] for index in sorted(part.tolist())] for part in order.tensor_split(PARTS)]
    try:
        together = _pass(work, group, rows)
        losses, gradient = _evaluated(together, work.params, u)
        size = _norm(gradient)
        found = torch.zeros_like(losses)
        for part in (_pass(work, some, rows) for some in parts):
            values, alone = _evaluated(part, work.params, u)
            found[torch.isin(together.rows, part.rows)] = values
            gradient = {name: g - alone[name] for name, g in gradient.items()}
    except REFUSALS:  # a number of sequences that the model is not made for; one at a time is as right
        return False
    tolerance = torch.finfo(losses.dtype).eps ** 0.6
    same = bool(((found - losses).abs() <= tolerance * (1 + losses.abs())).all())
    return same and _norm(gradient) <= tolerance * size


def _evaluated(one: Pass, params: Params, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = leaves_of(params)
    with torch.enable_grad():
        losses = one.losses(leaves)
    return losses.detach(), pulled(losses, leaves, weights[0, one.rows].to(losses))


def _norm(tree: Params) -> float:
    return inner(stacked(tree), stacked(tree)).sqrt().item()
