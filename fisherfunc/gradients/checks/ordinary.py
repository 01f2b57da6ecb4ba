"""Ordinary backward passes of the batch as given, which the check holds Grams against: ∇ Σₙ uₙ ℓₙ.

A plain call of a fresh copy of the module on the user's sequences together, padding and all, and one backward pass. No
sequence has the company that it had in the pass: a group that ran together is halved, and one that ran alone runs
beside others, so that sequences that reach one another, in values or in gradients alone, have other losses than in the
survey, or other gradients than in the pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff.pullback import check_left_behind, no_other_gradients, strided
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.rows.gradient_rows import runs
from fisherfunc.gradients.rows.stacks import neighbours
from fisherfunc.gradients.rows.subsample import Coordinates
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.gradients.survey.agreement import check_losses

MOST = 32
"""Sequences that run together at most: a fault in one of them is to show."""
BESIDE = 7
"""Others that run beside one whose pass was by itself, where there are as many: the next one may be like it, and two
that are alike show nothing of each other."""
MOST_TOKENS = 256
"""Of shorter sequences as many as have these tokens: one of 256 that is wrong shows at 4e-3 of their trace."""


@dataclass(frozen=True, kw_only=True)
class Company:
    """Sequences that run together, and their rows.

    Attributes:
        members: Their numbers.
        first: The first row of theirs.
        last: The one after their last.
        beside: How many others run beside one that would run alone, as torch itself gets some batches of one wrong.
        most: How many where there are more to choose from.
    """

    members: tuple[int, ...]
    first: int
    last: int
    beside: int = 0
    most: int = 0


def signed_sizes(count: int, *, seed: int) -> Tensor:
    """Draw numbers of both signs between ½ and 1½ in size: sums by them of what is alike do not cancel, but for chance.

    Args:
        count: How many, in float64 on the CPU.
        seed: Of the draw.
    """
    drawn = 2 * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu") - 1
    return drawn + drawn.sign() / 2


def companies(work: Workload, *, ran: int, limit: int, alone: bool = False) -> Iterator[Company]:
    """Divide the sequences into those that run together here.

    Args:
        work: What was passed over.
        ran: How many neighbours of one shape ran together in the pass, at most: here half of each group of them do.
        limit: Of the memory, in bytes; what a pass saves takes up to a quarter, or more where two sequences need it.
        alone: Whether each runs by itself.
    """
    width = 1 if alone else _width(work, limit)
    bounds = iter(list(runs(work.tokens.sequence)))
    members = work.tokens.sequence.unique_consecutive().tolist()
    for group in neighbours(members, work.sequences, ran if ran > 1 and not alone else width):
        half = min(width, -(-len(group) // 2)) if ran > 1 else width
        for start in range(0, len(group), half):
            some = tuple(group[start : start + half])
            rows = [next(bounds) for _ in some]
            beside = 0 if alone else 1 + (ran > 1 and len(group) == 2)
            most = beside if alone or ran > 1 else max(1, min(BESIDE, width - 1))
            yield Company(members=some, first=rows[0][0], last=rows[-1][1], beside=beside, most=most)


def check_losses_in_parts(work: Workload, *, limit: int) -> None:
    """Raise where sequences have other losses without half of those that they ran beside in the survey.

    Cost: a forward pass of half of the sequences.

    Args:
        work: What was surveyed.
        limit: See `companies`.

    Raises:
        ValueError: See `check_losses`.
    """
    members = [] if work.tokens.draw is not None else work.tokens.sequence.unique_consecutive().tolist()
    for group in neighbours(members, work.sequences, _width(work, limit)):
        part = group[len(group) // 2 :]
        _, losses = _run(work, part, list(work.params)) if len(group) > 1 else ({}, None)
        if losses is not None:
            chosen = torch.isin(work.tokens.sequence, work.tokens.sequence.new_tensor(part)).nonzero().squeeze(-1)
            few = work.select(chosen)
            place = torch.searchsorted(few.tokens.sequence.new_tensor(part), few.tokens.sequence)
            check_losses(few, losses.detach()[place, few.tokens.entry])


def whole(found: Sequence[Company]) -> Company:
    """Return all of them as one."""
    members = tuple(member for company in found for member in company.members)
    return Company(members=members, first=found[0].first, last=found[-1].last)


@runtime_checkable
class Across(Protocol):
    """What the check of one rank asks of the others (ranks/certificate.py)."""

    def gradient(self, tree: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum over ranks of gradients."""

    def sums(self, traces: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums like Σ uₙ² Kₙₙ, and uᵀ K u, over the rows of all ranks, for the weights of those here."""


def _width(work: Workload, limit: int) -> int:
    """How many sequences run together, by what the largest saves for its backward pass."""
    most = max(MOST, MOST_TOKENS // int(work.tokens.sequence.bincount().max()))
    return max(1, min(most, limit // 4 // max(work.nature.saved_bytes, 1)))


def squared_norms(
    work: Workload,
    weights: Tensor,
    each: Sequence[Company],
    *,
    coordinates: Coordinates,
    room: int,
    across: Across | None,
) -> list[dict[str, float]]:
    """Return ‖Σₙ uₙ ∇_p ℓₙ‖² of each parameter.

    Args:
        work: What was passed over.
        weights: `(N,)`, u.
        each: The sequences that run together: there is a result for each, and one for all where there are several.
        coordinates: The columns that are kept.
        room: Bytes that gradients may take at a time.
        across: Of ranks, the others, whose gradients are added to those of all here.

    Raises:
        ValueError: If losses are not those that the survey found.
    """
    several = len(each) > 1 or across is not None
    found: list[list[Tensor]] = [[] for _ in range(len(each) + several)]
    for names in parts(work.params, room):
        total: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for norms, company in zip(found, each, strict=False):
            tree, own = gradients(work, company, names, weights=weights)
            losses.append(own)
            tree = {name: kept(gradient, name, coordinates) for name, gradient in tree.items()}
            norms.append(_norms(tree))
            if several:
                total = _added(total, tree)
        check_losses(work, torch.cat(losses))
        if total:
            total = total if across is None else across.gradient(total)
            found[-1].append(_norms(total))
    squared = torch.stack([some[0] if len(some) == 1 else torch.cat(some) for some in found]).square()
    return [dict(zip(work.params, norms, strict=True)) for norms in squared.tolist()]


def _norms(tree: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
    return torch.stack(torch._foreach_norm(list(tree.values()), 2, dtype=torch.float64))


def _added(one: dict[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their sum, name by name; the first is empty, or written to.

    The sum has memory of its own: gradients of two leaves that meet as views of one tensor may share theirs.
    """
    if not one:
        return dict(zip(other, torch._foreach_add(list(other.values()), 0), strict=True))
    torch._foreach_add_(list(one.values()), [other[name] for name in one])
    return one


def check_bytes(params: Mapping[str, Tensor], limit: int) -> int:
    """Return what gradients take in a check: of some parameters, of a company and all; three of the largest.

    Args:
        params: Of the model.
        limit: Of the memory, in bytes.
    """
    sizes = {name: param.numel() * param.element_size() for name, param in params.items()}
    return 2 * max(sum(sizes[n] for n in names) for names in parts(params, room(limit))) + 3 * max(sizes.values())


def room(limit: int) -> int:
    """Return what the gradients of a company may take at a time."""
    return limit // 4


def parts(params: Mapping[str, Tensor], room: int) -> list[list[str]]:
    """Return the parameters in parts whose gradients take so many bytes, or are those of one."""
    found: list[list[str]] = [[]]
    left = room
    for name, param in params.items():
        size = param.numel() * param.element_size()
        if size > left and found[-1]:
            found.append([])
            left = room
        left -= size
        found[-1].append(name)
    return found


def kept(gradient: Tensor, name: str, coordinates: Coordinates) -> Tensor:
    """Return the coordinates of a parameter's gradient that are kept, scaled as they are."""
    if name not in coordinates.index:
        return gradient
    return gradient.flatten()[coordinates.index[name].to(gradient.device)] * coordinates.weight[name]


def gradients(
    work: Workload, company: Company, names: Sequence[str], *, weights: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return ∇ Σₙ uₙ ℓₙ over the rows of a company, and their losses.

    Agreement of one sequence with itself would share what torch itself gets wrong for a batch of one, and agreement of
    two with the same two what a model does by how many there are.

    Args:
        work: What was passed over.
        company: The sequences that run together.
        names: The parameters.
        weights: `(N,)`, u.
    """
    members, rows = list(company.members), slice(company.first, company.last)
    beside = company.beside if len(members) == 1 else 0
    losses: Tensor | None = None
    if beside:
        leaves, losses = _run(work, members + _others(work.sequences, members[0], company), names)
    if losses is None or not bool(losses[1:].isfinite().all()):  # 0 · NaN is NaN
        leaves, losses = _run(work, members * (1 + beside), names)
    sequence = work.tokens.sequence[rows]
    if losses is None:  # they do not run together
        total: dict[str, Tensor] = {}
        each: list[Tensor] = []
        for first, last in runs(sequence):
            one = Company(members=(int(sequence[first]),), first=rows.start + first, last=rows.start + last)
            tree, own = gradients(work, one, names, weights=weights)
            total = _added(total, tree)
            each.append(own)
        return total, torch.cat(each)
    place = torch.searchsorted(torch.tensor(company.members, device=sequence.device), sequence)
    chosen = losses[place, work.tokens.entry[rows]]
    if chosen.requires_grad:
        check_left_behind(chosen, leaves)
        for leaf in leaves.values():
            leaf.grad = None  # what a backward pass inside the model has left there
        with no_other_gradients(chosen, leaves):
            (weights[rows].to(chosen) @ chosen).backward()
    tree = {name: torch.zeros_like(p) if p.grad is None else strided(p.grad) for name, p in leaves.items()}
    return tree, chosen.detach()


def _others(sequences: Sequences, member: int, company: Company) -> list[int]:
    """The next sequences that can run with a sequence, over again where there are too few; it where none can."""
    others = (number % len(sequences) for number in range(member + 1, member + min(len(sequences), MOST)))
    found = list(islice((other for other in others if sequences.alike(member, other)), company.most))
    return list(islice(cycle(found or [member]), max(company.beside, len(found))))


def _run(work: Workload, members: Sequence[int], names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The losses of some sequences together, by an ordinary call; None where the model refuses more than one."""
    batch = work.sequences.joined(members)
    leaves, run = work.fn.ordinary_call(work.params, names)
    try:
        with torch.enable_grad():
            return leaves, work.loss.values(run(batch), batch)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:
        if len(members) == 1:
            raise
        return leaves, None
