"""The check of every run: uᵀ K u = ‖∇ Σₙ uₙ ℓₙ‖² for every block, by ordinary backward passes of the batch as given.

The right side is what a training step computes: a plain call of a fresh copy of the module on the user's sequences
together, padding and all, and one backward pass. It knows nothing of single sequences, of factors, or of what a pass
exploits, and it sees every token: uₙ = ±1/√Kₙₙ, so that no token drowns another. It is held for each stack of sequences
by itself and for all of them together. Half as many sequences run together here as in the pass, so that those that
reach one another, in values or in gradients alone, have other gradients here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fisherfunc.gradients.dense.subsample import EVERY, Coordinates
from fisherfunc.gradients.nature import coarsest
from fisherfunc.gradients.pullback import strided
from fisherfunc.gradients.refusals import REFUSALS
from fisherfunc.gradients.rows import runs
from fisherfunc.gradients.sequences import Sequences
from fisherfunc.gradients.sound import SoundPass
from fisherfunc.gradients.stacks import neighbours
from fisherfunc.gradients.survey import samples_meet
from fisherfunc.gradients.workload import Workload
from fisherfunc.linalg.gram import raise_vanished, squares_vanish

MOST = 32
"""Sequences that run together at most: a fault in one of them is to show."""
MOST_TOKENS = 256
"""Of shorter sequences as many as have these tokens: one of 256 that is wrong shows at 4e-3 of their trace."""
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Of a block's own trace. Where all is right, float32 was seen to differ by 1e-7 to 2e-6 and float64 by 1e-15; a
document of thirty with another structure differs by 4e-3. Of coarser dtypes it is √eps."""
ROUNDING = 16
"""In eps: by how much a gradient of ordinary size, relative to itself, may differ from one computation to another."""
FLOOR = 4
"""In eps of the norm of the whole gradient: how far off that of a block may be, as that of a key bias is, which is zero
but for round-off."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """How far the Grams of a pass are from ordinary backward passes.

    Attributes:
        difference: The largest difference of a block, over its trace; where some are too large, of fewest sequences.
        tolerance: What was allowed.
        block: The block that differs by it.
        sequences: Those of the stack in which it does.
        failing: All blocks that differ by more than is allowed.
        differences: {block: its largest difference over its trace, with no allowance for what is zero but for
            round-off}.
    """

    difference: float
    tolerance: float
    block: str
    sequences: tuple[int, ...]
    failing: frozenset[str]
    differences: Mapping[str, float]

    @property
    def holds(self) -> bool:
        """Whether nothing differs by more than is allowed, or by NaN."""
        return self.difference <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """What results say of it."""
        return {"held": self.holds, "difference": self.difference, "tolerance": self.tolerance, "block": self.block}

    def told(self) -> str:
        """Say where a difference is, and how large."""
        last = self.sequences[-1]
        where = f"sequence {last}" if len(self.sequences) == 1 else f"sequences {self.sequences[0]} to {last}"
        return (
            f"block {self.block!r} differs from an ordinary backward pass of {where} together by {self.difference:.1e} "
            f"of its trace, where {self.tolerance:.1e} is allowed"
        )


@runtime_checkable
class Across(Protocol):
    """What the check of one rank asks of the others (ranks/certificate.py)."""

    def gradient(self, tree: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum over ranks of gradients."""

    def sums(self, traces: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return Σ uₙ² Kₙₙ and uᵀ K u over the rows of all ranks, for the weights of those here."""


def certified(
    done: SoundPass,
    done_by: Callable[[str, str, Mapping[str, str]], SoundPass] | None = None,
    *,
    check: Callable[..., Certificate] | None = None,
    labels: Mapping[str, str] | None = None,
    coordinates: Coordinates = EVERY,
    limit: int,
    seed: int = 0,
) -> tuple[SoundPass, Certificate]:
    """Return a pass that the check holds for, and the check: this one, or where it fails another one.

    A factored pass is made again without what it exploits, then without the factors that differ, then by the dense
    route.

    Args:
        done: The pass.
        done_by: (route, why, what is refused) → another pass over the same rows; None where there is no other route.
        check: What it is held by: `certify` where None.
        labels: See `certify`.
        coordinates: See `certify`.
        limit: See `certify`.
        seed: See `certify`.

    Raises:
        ValueError: If the check fails on the dense route as well, or as the samples of a batch depend on each other.
    """
    refused: dict[str, str] | None = {}
    how: dict[str, Any] = {"labels": labels, "coordinates": coordinates, "limit": limit, "seed": seed}
    while True:
        held = partial(check or certify, done.grams, done.rows, **how, stack_width=done.how.get("stack_width", 1))
        found = held()
        if found.holds:
            return done, found
        if not done.rows.loss.each_alone and held(alone=True).holds:
            raise ValueError(f"{found.told()}, and agrees with those of each alone: {samples_meet(done.rows.loss)}")
        if done.how["route"] == "dense":
            raise ValueError(
                f"{found.told()}: no gradient per token that could be had here adds up to that of the batch. "
                "Something in the model's backward pass depends on what runs beside a sample, or on how often it ran; "
                "self_check=False gives the numbers all the same"
            )
        assert done_by is not None
        refused = refused_then(refused, done.how["exploited"], found, done.rows.params, labels)
        why = f"the check of the factored route failed: {found.told()}"
        done = done_by("dense", why, {}) if refused is None else done_by("factored", why, refused)


def refused_then(
    refused: Mapping[str, str] | None,
    exploited: Sequence[str],
    found: Certificate,
    names: Iterable[str],
    labels: Mapping[str, str] | None = None,
) -> dict[str, str] | None:
    """Return what is refused after a check has failed, {exploit or parameter: why}; None where nothing is left.

    Args:
        refused: What was before.
        exploited: What the pass exploits.
        found: The check.
        names: The parameters.
        labels: See `certify`.
    """
    before = dict(refused or {})
    if more := [exploit for exploit in exploited if exploit not in before]:
        return before | dict.fromkeys(more, found.told())
    failing = {name for name in names if _label(name, labels) in found.failing}
    if not failing.isdisjoint(before):  # that was no help
        return None
    return before | dict.fromkeys(sorted(failing), "its factors do not give its gradient")


def certify(
    grams: Mapping[str, Tensor],
    work: Workload,
    *,
    labels: Mapping[str, str] | None = None,
    coordinates: Coordinates = EVERY,
    limit: int,
    seed: int = 0,
    alone: bool = False,
    stack_width: int = 1,
    across: Across | None = None,
) -> Certificate:
    """Hold the Grams of a pass against ordinary backward passes.

    Cost: a forward and a backward pass of the batch, two in half precision.

    Args:
        grams: By parameter or label.
        work: What was passed over; all of its rows are finite.
        labels: {parameter: the label that its Gram was added under}.
        coordinates: The columns that were kept.
        limit: In bytes; gradients take up to half of it, activations a quarter, or more where two sequences need it.
        seed: Of the signs.
        alone: Whether each sequence runs by itself.
        stack_width: How many ran together in the pass: here half as many do, as a model may act on how many there are.
        across: Of ranks, the others: then all rows together are those of all of them.

    Raises:
        ValueError: If the Grams are zero, or almost, where gradients are not, or only their squares are.
    """
    dtype = coarsest(work.nature.precision, *(gram.dtype for gram in grams.values()))
    # Sums of float16 over a batch lose what its few exponents have no room for, where those of a sequence do not.
    alone = alone or work.loss.each_alone or work.nature.draws or dtype == torch.float16
    tolerance, floor = TOLERANCES.get(dtype, torch.finfo(dtype).eps ** 0.5), FLOOR * torch.finfo(dtype).eps
    diagonals = torch.stack([gram.diagonal().double() for gram in grams.values()])
    diagonal = diagonals.sum(dim=0)
    width, beside = 1 if alone else _width(work, limit), 0 if alone else 1 + (stack_width == 2)
    stacks = list(_stacks(work, min(width, -(-stack_width // 2)) if stack_width > 1 else width))
    several = [_whole(stacks)] if len(stacks) > 1 or across is not None else []
    if squares_vanish(float(diagonal.sum())):
        _raise_where_not_zero(work, stacks, beside)
    # A row that came out as zero may be one that was lost: it is weighted as the others are, or nobody would see it.
    usual = diagonal.sum() / (diagonal > 0).sum().clamp(min=1)
    sizes = torch.where(diagonal > 0, diagonal, usual)
    trusted = (_size_of_residual(work, sizes) * tolerance / (ROUNDING * torch.finfo(dtype).eps)).clamp(max=1.0)
    found, differences = [], dict.fromkeys(grams, 0.0)
    for number in range(draws(grams, work)):
        generator = torch.Generator().manual_seed(2 * seed + number)
        signs = 2 * torch.randint(2, diagonal.shape, generator=generator, device="cpu").to(diagonal) - 1
        weights = torch.where(sizes > 0, signs * trusted * sizes.clamp(min=TINY).rsqrt(), 0.0)
        run = partial(_gradients, work, weights=weights, beside=beside)
        expected = _squared_norms(work, stacks, run, coordinates=coordinates, room=room(limit), across=across)
        for stack, norms in zip([*stacks, *several], expected, strict=True):
            rows, u = slice(stack.first, stack.last), weights[stack.first : stack.last]
            blocks = [gram[rows, rows] for gram in grams.values()]
            sums = (
                diagonals[:, rows] @ u.square(),
                torch.stack([u @ (block @ u.to(block)).double() for block in blocks]),
            )
            if across is not None and stack is several[-1]:
                sums = across.sums(sums[0], u)
            traces, products = (column.tolist() for column in sums)
            off = floor * sum(traces) ** 0.5
            for label, trace, product in zip(grams, traces, products, strict=True):
                norm = sum(norms[name] for name in work.params if _label(name, labels) == label)
                allowed = tolerance * trace + 2 * off * trace**0.5 + off**2 + TINY
                error = abs(product - norm)
                differences[label] = max(differences[label], error / max(trace, TINY))
                found.append((tolerance / allowed * error, label, stack.members))
    wrong = [one for one in found if not one[0] <= tolerance]  # NaN is wrong
    least = min((len(sequences) for _, _, sequences in wrong), default=0)
    shown = [one for one in wrong if len(one[2]) == least] or found
    difference, block, sequences = max(shown, key=lambda one: (one[0] != one[0], one[0]))
    return Certificate(
        difference=difference,
        tolerance=tolerance,
        block=block,
        sequences=sequences,
        failing=frozenset(label for _, label, _ in wrong),
        differences=differences,
    )


TINY = torch.finfo(torch.float64).tiny


def draws(grams: Mapping[str, Tensor], work: Workload) -> int:
    """Return for how many draws of signs the check is held."""
    return 1 if coarsest(work.nature.precision, *(gram.dtype for gram in grams.values())) in TOLERANCES else 2


def _raise_where_not_zero(work: Workload, stacks: Sequence["_Stack"], beside: int) -> None:
    weights = torch.rand(work.num_tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    for stack in stacks:
        gradients = _gradients(
            work, stack, list(work.params), weights=weights.to(work.tokens.loss.device), beside=beside
        )
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        if not squares_vanish(largest**2):
            raise ValueError(
                f"all Grams are zero, and an ordinary backward pass has gradients up to {largest:.1e}: the losses "
                "depend on the parameters by round-off alone, or a pass has lost them; self_check=False gives the zeros"
            )
        raise_vanished(largest)


def _size_of_residual(work: Workload, sizes: Tensor) -> Tensor:
    """How small each row's gradient is beside what it is a difference of; the relative error is eps over it.

    Of a token that is predicted well, 1 − p has lost what p and 1 have in common, and no two computations agree to more
    than that. What is no difference of known things is taken beside the largest row.
    """
    loss, kind = work.tokens.loss.to(sizes), work.loss.distribution
    if work.tokens.draw is None and kind in ("categorical", "bernoulli"):
        return -torch.expm1(-loss)
    if work.tokens.draw is None and kind == "gaussian":
        targets = [work.loss.targets(part.batch) for part in work.sequences.parts]
        largest = max(float(y.abs().max()) for y in targets if y is not None)
        residual = (2 * loss).clamp(min=0).sqrt()
        return residual / (residual + largest)
    return (sizes / sizes.max().clamp(min=TINY)).sqrt()


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Sequences that run together, and their rows, from the first to the one after the last."""

    members: tuple[int, ...]
    first: int
    last: int


def _stacks(work: Workload, width: int) -> Iterator[_Stack]:
    bounds = iter(list(runs(work.tokens.sequence)))
    for group in neighbours(work.tokens.sequence.unique_consecutive().tolist(), work.sequences, width):
        rows = [next(bounds) for _ in group]
        yield _Stack(members=tuple(group), first=rows[0][0], last=rows[-1][1])


def _whole(stacks: Sequence[_Stack]) -> _Stack:
    members = tuple(member for stack in stacks for member in stack.members)
    return _Stack(members=members, first=stacks[0].first, last=stacks[-1].last)


def _width(work: Workload, limit: int) -> int:
    """How many sequences run together, by what the largest saves for its backward pass."""
    most = max(MOST, MOST_TOKENS // int(work.tokens.sequence.bincount().max()))
    return max(1, min(most, limit // 4 // max(work.nature.saved_bytes, 1)))


def _squared_norms(
    work: Workload,
    stacks: Sequence[_Stack],
    run: Callable[[_Stack, Sequence[str]], dict[str, Tensor]],
    *,
    coordinates: Coordinates,
    room: int,
    across: Across | None,
) -> list[dict[str, float]]:
    """‖Σₙ uₙ ∇_p ℓₙ‖² of each parameter, for each stack, and then for all of them together where there are several."""
    several = len(stacks) > 1 or across is not None
    found: list[dict[str, float]] = [{} for _ in range(len(stacks) + several)]
    for names in parts(work.params, room):
        total: dict[str, Tensor] = {}
        for norms, stack in zip(found, stacks, strict=False):
            kept = {name: _kept(gradient, name, coordinates) for name, gradient in run(stack, names).items()}
            norms |= _squared(kept)
            if several:
                total = _added(total, kept)
        if total:
            found[-1] |= _squared(total if across is None else across.gradient(total))
    return found


def _squared(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients.values()])
    return dict(zip(gradients, norms.square().tolist(), strict=True))


def _added(one: dict[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.pop(name) + gradient if name in one else gradient for name, gradient in other.items()}


def check_bytes(params: Mapping[str, Tensor], limit: int) -> int:
    """Return what gradients take in a check: of some parameters, those of a stack and their sum; three of the largest.

    Args:
        params: Of the model.
        limit: Of the memory, in bytes.
    """
    sizes = {name: param.numel() * param.element_size() for name, param in params.items()}
    return 2 * max(sum(sizes[n] for n in names) for names in parts(params, room(limit))) + 3 * max(sizes.values())


def room(limit: int) -> int:
    """Return what the gradients of a stack may take at a time."""
    return limit // 4


def parts(params: Mapping[str, Tensor], room: int) -> list[list[str]]:
    """The parameters in parts whose gradients take so many bytes, or are those of one."""
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


def _kept(gradient: Tensor, name: str, coordinates: Coordinates) -> Tensor:
    if name not in coordinates.index:
        return gradient
    return gradient.flatten()[coordinates.index[name].to(gradient.device)] * coordinates.weight[name]


def _gradients(
    work: Workload, stack: _Stack, names: Sequence[str], *, weights: Tensor, beside: int
) -> dict[str, Tensor]:
    """Return ∇ Σₙ uₙ ℓₙ over the rows of a stack; one sequence runs beside so many others.

    Agreement of one sequence with itself would share what torch itself gets wrong for a batch of one; two run beside it
    where the pass ran two, as a model may act on how many there are.
    """
    members, rows = list(stack.members), slice(stack.first, stack.last)
    if len(members) == 1 and beside:
        members += [_another(work.sequences, members[0])] * beside
    leaves, losses = _run(work, members, names)
    sequence = work.tokens.sequence[rows]
    if losses is not None and not bool(losses[len(stack.members) :].isfinite().all()):
        leaves, losses = _run(work, list(stack.members) * (1 + beside), names)  # 0 · NaN is NaN
    if losses is None:  # they do not run together
        total: dict[str, Tensor] = {}
        for first, last in runs(sequence):
            one = _Stack(members=(int(sequence[first]),), first=rows.start + first, last=rows.start + last)
            total = _added(total, _gradients(work, one, names, weights=weights, beside=0))
        return total
    place = torch.searchsorted(torch.tensor(stack.members, device=sequence.device), sequence)
    chosen = losses[place, work.tokens.entry[rows]]
    if chosen.requires_grad:
        for leaf in leaves.values():
            leaf.grad = None  # what a backward pass inside the model has left there
        (weights[rows].to(chosen) @ chosen).backward()
    return {name: torch.zeros_like(p) if p.grad is None else strided(p.grad) for name, p in leaves.items()}


def _another(sequences: Sequences, member: int) -> int:
    """One of the next sequences that can run with a sequence; that itself where none can."""
    others = (number % len(sequences) for number in range(member + 1, member + min(len(sequences), MOST)))
    return next((other for other in others if sequences.alike(member, other)), member)


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


def _label(name: str, labels: Mapping[str, str] | None) -> str:
    return name if labels is None else labels[name]
