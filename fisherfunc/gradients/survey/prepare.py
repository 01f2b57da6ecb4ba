"""Before a pass, and before its plan: options that make sense, and the tokens that it will be over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from fisherfunc.distributed.collectives import Everyone, Ranks
from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.autodiff.nature import Nature
from fisherfunc.gradients.data.batches import read
from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.data.sources import Gathered, gathered
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.losses.asked import AnyLoss, token_loss_of
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.gradients.survey.readings import Reading, reading_of, settled
from fisherfunc.gradients.survey.survey import survey
from fisherfunc.linalg.grams.token_grams import Tokens
from fisherfunc.linalg.mapped import check_not_transformed
from fisherfunc.records.axes import Batch, Params

ROUTES = ("factored", "dense")
UNITS = ("token", "sequence")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is seen of a model on one batch, and not looked at again on another of the same shapes.

    Attributes:
        reading: How it reads targets; None where more of a batch was unclear, which is looked at each time.
        nature: Its arithmetic.
    """

    reading: Reading | None
    nature: Nature


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What is to be passed over.

    Attributes:
        work: The chosen tokens.
        num_valid: How many tokens there were to choose from.
        num_dropped: Tokens left out as their losses are not finite.
        seen: What was seen of the model.
        data: What was pulled of a source.
    """

    work: Workload
    num_valid: int
    num_dropped: int
    seen: Seen
    data: Mapping[str, Any] | None = None


def pulled(batch: Batch, num_tokens: int | None, loss_of: Callable[[list[Batch]], TokenLoss]) -> Gathered:
    """Pull batches of a source until they hold `num_tokens` tokens; what is no source stays as it is.

    Of a loss of one's own that does not say which tokens count, each sequence is known to have one.

    Args:
        batch: What a user gives.
        num_tokens: How many are needed; all that there are where None.
        loss_of: The first batches → the loss that says which tokens count.
    """
    loss: TokenLoss | None = None

    def count(batches: list[Batch]) -> int:
        nonlocal loss
        loss = loss or loss_of(batches)
        masks = [loss.valid(one) for one in batches]
        return sum(
            len(split(one)) if mask is None else int(mask.sum()) for one, mask in zip(batches, masks, strict=True)
        )

    return gathered(batch, read=read, num_tokens=num_tokens, count=count)


def prepared(
    fn: ModelFunction,
    params: Params,
    batch: Batch,
    loss: AnyLoss,
    *,
    num_tokens: int | None = None,
    seed: int = 0,
    drop_nonfinite: bool = False,
    seen: Seen | None = None,
    checked: bool = False,
    everyone: Everyone | None = None,
) -> Prepared:
    """Find the valid tokens by one forward pass of each sequence, and pick those wanted.

    Where the model was seen on a batch of the same shapes, it is not looked at again, but for whether the sequences of
    this one reach each other.

    Args:
        fn: The model.
        params: What to differentiate by.
        batch: A batch, a list of them, or a source, of which as many are pulled as hold `num_tokens`.
        loss: The loss.
        num_tokens: How many tokens, at most.
        seed: Of their choice.
        drop_nonfinite: Whether to leave out tokens whose loss is not finite.
        seen: What was seen of the model on a batch of the same shapes.
        checked: Whether the losses will be held against those of ordinary calls.
        everyone: The ranks that do it together, with the same batch; this process alone where None.

    Raises:
        ValueError: If no token is valid, a loss is not finite, or gradients would miss something.
        RuntimeError: If a transform of `torch.func` is around the parameters.
    """
    instead = "loop over the parameters, then stack the Grams and map a kernel over them: docs/composing.md shows it"
    check_not_transformed("a pass over the tokens", instead=instead)
    _check_seed(seed)
    data = pulled(batch, num_tokens, lambda first: token_loss_of(loss, first))
    params, loss, given = fn.at(params), token_loss_of(loss, data.batches), split(data.batches)
    everyone = everyone or Everyone(ranks=Ranks())
    reading, known = (None, None) if seen is None else (seen.reading, seen.nature)
    if everyone.rank == 0:
        settled_fn, sequences = settled(fn, params, given, loss, known=reading)
        reading = reading or reading_of(fn, given, settled_fn)
    reading = everyone.from_first("how the model reads a batch", lambda: reading)
    if everyone.rank > 0:
        settled_fn, sequences = settled(fn, params, given, loss, known=reading)
    how: dict[str, Any] = {"drop_nonfinite": drop_nonfinite, "known": known, "checked": checked}
    found = survey(settled_fn, params, sequences, loss, **how, everyone=everyone)
    tokens = _pick(found.tokens, num_tokens, seed)
    if seen is None:
        seen = Seen(reading=reading, nature=found.nature)
    work = Workload(fn=settled_fn, params=params, sequences=sequences, loss=loss, tokens=tokens, nature=found.nature)
    return Prepared(
        work=work, num_valid=len(found.tokens.sequence), num_dropped=found.num_dropped, seen=seen, data=data.facts
    )


def check_options(num_tokens: int | None, chunk_size: int | None, memory_limit: Any, route: str, unit: str) -> None:
    """Raise where an option is none that a pass can have."""
    if unit not in UNITS:
        raise ValueError(f"unit expected 'token' or 'sequence', got unit={unit!r}")
    if route not in ROUTES:
        raise ValueError(f"route expected one of {ROUTES}, got route={route!r}")
    if memory_limit is not None and not isinstance(memory_limit, Integral):
        raise TypeError(f"memory_limit expected a number of bytes, got {memory_limit!r}; 2 GB are 2_000_000_000")
    for name, value in (("num_tokens", num_tokens), ("chunk_size", chunk_size)):
        if value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} expected an integer of at least 1, got {name}={value!r}")
        if value < 1:
            raise ValueError(f"{name} expected at least 1, got {name}={value}")


def _check_seed(seed: Any) -> None:
    """Raise where a generator of torch cannot begin from a seed."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= int(seed) < 2**63:
        raise TypeError(f"seed expected an integer of 64 bits, got seed={seed!r}")


def _pick(tokens: Tokens, num_tokens: int | None, seed: int) -> Tokens:
    count = len(tokens.sequence)
    if num_tokens is None or num_tokens >= count:
        return tokens
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    return tokens.select(order[:num_tokens].sort().values.to(tokens.sequence.device))
