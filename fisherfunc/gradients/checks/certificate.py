"""The check of every run: uᵀ K u = ‖∇ Σₙ uₙ ℓₙ‖² for every block, by ordinary backward passes of the batch as given.

The right side is what a training step computes: a plain call of a fresh copy of the module on the user's sequences
together, padding and all, and one backward pass. It knows nothing of single sequences, of factors, or of what a pass
exploits. It sees every token: |uₙ| is between ½/√Kₙₙ and 1½/√Kₙₙ, so that no token drowns another, and two that are
alike do not cancel, with whatever is wrong in both. It is held for the sequences that run together by themselves, and
for all of them (ordinary.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from fisherfunc.gradients.autodiff.nature import coarsest
from fisherfunc.gradients.checks.ordinary import (
    Across,
    Company,
    check_losses_in_parts,
    companies,
    gradients,
    room,
    signed_sizes,
    squared_norms,
    whole,
)
from fisherfunc.gradients.checks.sound import SoundPass
from fisherfunc.gradients.rows.subsample import EVERY, Coordinates
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.gradients.survey.agreement import samples_meet
from fisherfunc.linalg.gram import raise_vanished, squares_vanish

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
        sequences: Those that ran together where it does.
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
        held = partial(check or certify, done.grams, done.rows, **how, stack_width=done.how.stack_width or 1)
        found = held()
        if found.holds:
            return done, found
        if not done.rows.loss.each_alone and held(alone=True).holds:
            raise ValueError(f"{found.told()}, and agrees with those of each alone: {samples_meet(done.rows.loss)}")
        if done.how.route == "dense":
            raise ValueError(
                f"{found.told()}: no gradient per token that could be had here adds up to that of the batch. "
                "Something in the model's backward pass depends on what runs beside a sample, or on how often it ran; "
                "self_check=False gives the numbers all the same"
            )
        assert done_by is not None
        refused = refused_then(refused, done.how.exploited or (), found, done.rows.params, labels)
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
        seed: Of the weights.
        alone: Whether each sequence runs by itself.
        stack_width: How many ran together in the pass; see `companies`.
        across: Of ranks, the others: then all rows together are those of all of them.

    Raises:
        ValueError: If the Grams are zero, or almost, where gradients are not, or only their squares are, or if losses
            are not those that the survey found.
    """
    dtype = coarsest(work.nature.precision, *(gram.dtype for gram in grams.values()))
    # Sums of float16 over a batch lose what its few exponents have no room for, where those of a sequence do not.
    alone = alone or work.loss.each_alone or work.nature.draws or dtype == torch.float16
    tolerance, floor = TOLERANCES.get(dtype, torch.finfo(dtype).eps ** 0.5), FLOOR * torch.finfo(dtype).eps
    diagonals = torch.stack([gram.diagonal().double() for gram in grams.values()])
    diagonal = diagonals.sum(dim=0)
    if stack_width == 1 and not alone:  # then the check may give the sequences the company that they had in the survey
        check_losses_in_parts(work, limit=limit)
    each = list(companies(work, ran=stack_width, limit=limit, alone=alone))
    everyone = [whole(each)] if len(each) > 1 or across is not None else []
    if squares_vanish(float(diagonal.sum())):
        _raise_where_not_zero(work, each)
    # A row that came out as zero may be one that was lost: it is weighted as the others are, or nobody would see it.
    usual = diagonal.sum() / (diagonal > 0).sum().clamp(min=1)
    sizes = torch.where(diagonal > 0, diagonal, usual)
    lost = (ROUNDING * torch.finfo(dtype).eps / _size_of_residual(work, sizes).clamp(min=TINY)).clamp(max=1.0)
    trusted = (tolerance / lost).clamp(max=1.0)
    lost = lost if dtype in TOLERANCES else torch.zeros_like(lost)  # the tolerance of the others has it in it
    found, differences = [], dict.fromkeys(grams, 0.0)
    for number in range(draws(grams, work)):
        signed = signed_sizes(len(diagonal), seed=2 * seed + number).to(diagonal)
        weights = torch.where(sizes > 0, signed * trusted * sizes.clamp(min=TINY).rsqrt(), 0.0)
        expected = squared_norms(work, weights, each, coordinates=coordinates, room=room(limit), across=across)
        sums = _sums(list(grams.values()), diagonals, weights, lost, each)
        if everyone:
            traces = sums[:2].sum(dim=2)
            there = (traces, _forms(grams.values(), weights)) if across is None else across.sums(traces, weights)
            sums = torch.cat([sums, torch.cat([there[0], there[1][None]])[..., None]], dim=2)
        columns = sums.permute(2, 0, 1).tolist()
        for company, norms, (own, rounded, products) in zip([*each, *everyone], expected, columns, strict=True):
            for label, trace, rounding, product in zip(grams, own, rounded, products, strict=True):
                norm = sum(norms[name] for name in work.params if _label(name, labels) == label)
                off = (floor**2 * sum(own) + rounding) ** 0.5
                allowed = tolerance * trace + 2 * off * trace**0.5 + off**2 + TINY
                error = abs(product - norm)
                differences[label] = max(differences[label], error / max(trace, TINY))
                found.append((tolerance / allowed * error, label, company.members))
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
SIDE_BY_SIDE = 2048
"""Rows of companies whose sums are taken in one product, with zeros where a company has no rows."""


def _sums(
    grams: Sequence[Tensor],
    diagonals: Float[Tensor, "l n"],
    weights: Float[Tensor, " n"],
    lost: Float[Tensor, " n"],
    each: Sequence[Company],
) -> Float[Tensor, "3 l c"]:
    """Σ uₙ² Kₙₙ, that of what rows have lost to rounding, and uᵀ K u of each Gram, over the rows of each company."""
    found = []
    for _, group in groupby(each, key=lambda company: company.first // SIDE_BY_SIDE):
        some = list(group)
        rows = slice(some[0].first, some[-1].last)
        counts = torch.tensor([company.last - company.first for company in some], device=weights.device)
        own = torch.repeat_interleave(counts, output_size=rows.stop - rows.start)
        columns = weights[rows, None] * functional.one_hot(own, len(some))
        products = _forms([gram[rows, rows] for gram in grams], columns)
        squares = torch.cat([columns.square(), (columns * lost[rows, None]).square()], dim=1)
        traces, rounded = (diagonals[:, rows] @ squares).chunk(2, dim=1)
        found.append(torch.stack([traces, rounded, products]))
    return torch.cat(found, dim=2)


def _forms(grams: Iterable[Tensor], columns: Float[Tensor, " n *c"]) -> Float[Tensor, "l *c"]:
    return torch.stack([((gram @ columns.to(gram)).double() * columns).sum(dim=0) for gram in grams])


def draws(grams: Mapping[str, Tensor], work: Workload) -> int:
    """Return for how many draws of weights the check is held."""
    return 1 if coarsest(work.nature.precision, *(gram.dtype for gram in grams.values())) in TOLERANCES else 2


def _raise_where_not_zero(work: Workload, each: Sequence[Company]) -> None:
    weights = torch.rand(work.num_tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    for company in each:
        tree, _ = gradients(work, company, list(work.params), weights=weights.to(work.tokens.loss.device))
        largest = max(float(gradient.abs().max()) for gradient in tree.values())
        if not squares_vanish(largest**2):
            raise ValueError(
                f"all Grams are zero, and an ordinary backward pass has gradients up to {largest:.1e}: the losses "
                "depend on the parameters by round-off alone, or a pass has lost them; self_check=False gives the zeros"
            )
        raise_vanished(largest)


def _size_of_residual(work: Workload, sizes: Tensor) -> Tensor:
    """How small each row's gradient is beside what it is a difference of; the relative error is some eps over it.

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


def _label(name: str, labels: Mapping[str, str] | None) -> str:
    return name if labels is None else labels[name]
