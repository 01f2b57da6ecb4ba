"""Rows that are not finite: an error that says where, or tokens left out. Such a row spoils its row and column only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fisherfunc.gradients.rows.gradient_rows import raise_nonfinite
from fisherfunc.gradients.rows.summed import summed
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.grams.divided import AnyGram, submatrix
from fisherfunc.linalg.grams.token_grams import Tokens
from fisherfunc.records.provenance import Provenance

Pass = Callable[[Workload], tuple[dict[str, Any], Provenance]]
"""Rows → their Grams, ordinary or divided, and how these were computed."""


@dataclass(frozen=True, kw_only=True)
class SoundPass:
    """A pass of which every row is finite.

    Attributes:
        rows: What its rows are: tokens, or the sums of a sequence's.
        grams: Their Grams: tensors, or divided ones (linalg/grams/divided.py).
        how: How these were computed.
        num_tokens: How many tokens the rows are made of.
    """

    rows: Workload
    grams: dict[str, Any]
    how: Provenance
    num_tokens: int


def sound_pass(work: Workload, passed: Pass, *, unit: str, drop_nonfinite: bool, of: str = "parameter") -> SoundPass:
    """Pass over the tokens, or over their sums by sequence.

    Where a sequence's row is not finite, its tokens are passed over one by one to find those to leave out, and the
    sequences again without these.

    Args:
        work: The tokens.
        passed: The pass.
        unit: "token" or "sequence".
        drop_nonfinite: Whether to leave out tokens whose gradient is not finite, rather than raise.
        of: What an error says that a Gram is of.

    Raises:
        ValueError: If a row is not finite and not to be left out, or no token remains.
    """
    rows = summed(work) if unit == "sequence" else work
    grams, how = passed(rows)
    sound = _finite(grams)
    if bool(sound.all()):
        return SoundPass(rows=rows, grams=grams, how=how, num_tokens=_num_tokens(work))
    if not drop_nonfinite:
        for name, gram in grams.items():
            raise_nonfinite(gram.diagonal().isfinite(), named(rows, unit), name, of=of)
    if unit == "sequence":
        return sound_pass(_without_unsound(work, rows, sound, passed), passed, unit=unit, drop_nonfinite=True)
    kept = _whole(sound, work).nonzero().squeeze(-1)
    _check_any(len(kept), work)
    grams = {name: submatrix(gram, kept) for name, gram in grams.items()}
    rows = rows.select(kept)
    return SoundPass(rows=rows, grams=grams, how=how, num_tokens=_num_tokens(rows))


def named(rows: Workload, unit: str, cluster: Int[Tensor, " s"] | None = None) -> Tokens:
    """The tokens that results carry, with the cluster of each where sequences have one: a sequence has no position."""
    tokens = rows.tokens
    if cluster is not None:
        tokens = replace(tokens, cluster=cluster.to(tokens.sequence.device)[tokens.sequence])
    if unit == "token":
        return tokens
    return replace(tokens, position=torch.full_like(tokens.position, -1), target=None)


def _finite(grams: Mapping[str, AnyGram]) -> Bool[Tensor, " n"]:
    return torch.stack([gram.diagonal() for gram in grams.values()]).isfinite().all(dim=0)


def _without_unsound(work: Workload, rows: Workload, sound: Tensor, passed: Pass) -> Workload:
    """The tokens less those of the sequences that are not sound whose own gradients are not finite."""
    suspects = torch.isin(work.tokens.sequence, rows.tokens.sequence[~sound]).nonzero().squeeze(-1)
    fine = _whole(_finite(passed(work.select(suspects))[0]), work)
    if bool(fine.all()):
        raise ValueError(
            f"the summed gradient of sequence {int(rows.tokens.sequence[~sound][0])} is not finite, though those of "
            "its tokens are; run the pass in a wider dtype, or use unit='token'"
        )
    kept = torch.ones(work.num_tokens, dtype=torch.bool, device=sound.device)
    kept[suspects[~fine]] = False
    _check_any(int(kept.sum()), work)
    return work.select(kept.nonzero().squeeze(-1))


def _whole(sound: Bool[Tensor, " n"], work: Workload) -> Bool[Tensor, " n"]:
    """Whether all rows of the token are sound: it stays or goes with all of its targets."""
    targets = work.tokens.num_targets
    return sound.reshape(-1, targets).all(dim=1).repeat_interleave(targets)


def _num_tokens(work: Workload) -> int:
    return work.num_tokens // work.tokens.num_targets


def _check_any(remaining: int, work: Workload) -> None:
    if remaining == 0:
        raise ValueError(
            f"the gradient of all {_num_tokens(work)} tokens is not finite; check the model's weights and dtype"
        )
