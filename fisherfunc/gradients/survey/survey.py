"""One forward pass of every sequence, before any gradient: which tokens there are, and their losses.

Errors that a long run would meet late (no valid token, targets out of range, a loss that is not finite) are found here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherfunc.distributed.collectives import Everyone, Ranks
from fisherfunc.gradients.autodiff.model_function import ModelFunction, has_gradient
from fisherfunc.gradients.autodiff.nature import Nature, Observed, coarsest
from fisherfunc.gradients.autodiff.pullback import check_backward, check_left_behind, check_reach, leaves_of, reaches
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.data.batches import others_than_tensors
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.losses import IGNORED, TokenLoss
from fisherfunc.gradients.rows.stacks import neighbours
from fisherfunc.gradients.survey.agreement import check_apart, goes_on, same_losses, samples_meet
from fisherfunc.linalg.grams.tokens import Tokens, concatenated
from fisherfunc.records.axes import Batch, Params
from fisherfunc.runtime.memory import SavedBytes

MOST_TOGETHER = 2048
FEWEST_TOGETHER = 16
"""Of fewer sequences, each is run alone as well."""
FEWEST = 2
"""What runs together at the least, to see whether its sequences reach each other."""
MOST_LOOKED_AT = 32
"""Sequences that are tried until one depends on a parameter: where none does, a larger batch would only take longer."""
BYTES_TOGETHER = 2**26
"""What sequences that run together would save for a backward pass, at most, with their predictions."""
PARTS = 8
"""How many parts of a group run without each other, at most, to see whether its sequences reach each other."""

_OFFSETS = (
    "; offsets into the ids of a whole batch mean nothing of one bag: pass padded ids, or a list of batches of one bag"
)


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """What there is to pass over.

    Attributes:
        tokens: The valid tokens, in the order of sequence and position.
        num_dropped: Tokens left out as their losses are not finite.
        nature: What was seen of the model's arithmetic, which holds for any batch of the same shapes.
    """

    tokens: Tokens
    num_dropped: int
    nature: Nature


def survey(
    fn: ModelFunction,
    params: Params,
    sequences: Sequences,
    loss: TokenLoss,
    *,
    drop_nonfinite: bool = False,
    known: Nature | None = None,
    checked: bool = False,
    everyone: Everyone | None = None,
) -> Surveyed:
    """Find the valid tokens and their losses.

    Cost: a forward pass, two of few sequences, and one of a sequence; where no check follows, two in any case, or one
    and a half where the model is known, and a forward and a backward pass of a sequence. Of ranks each runs its share,
    of enough sequences that they still meet in batches; rank 0 alone looks at the model.

    All of them have a graph, as in the pass: a model or a loss may compute something else without. Of one that is not
    known the largest sequence is run first, to see what its losses reach, and is to have the same ones in its batch. Of
    all other sequences that is for the check to say, in other company (`check_losses`); the survey itself looks where
    none follows.

    Args:
        fn: The model.
        params: Where to evaluate it.
        sequences: One-sequence batches.
        loss: The token loss.
        drop_nonfinite: Whether to leave out tokens whose loss is not finite, rather than raise.
        known: What was seen of the model on a batch of the same shapes.
        checked: Whether the losses will be held against those of ordinary calls (certificate.py).
        everyone: The ranks that do it together, with the same sequences; this process alone where None.

    Raises:
        ValueError: If no token is valid, shapes differ, a target is out of range, a loss is not finite, or sequences
            that run together, or one that runs again, have other losses than each alone, or gradients would miss
            something.
    """
    everyone = everyone or Everyone(ranks=Ranks())
    first, nature = None, known
    with torch.enable_grad():
        if known is None and everyone.rank == 0:
            first, nature = _looked_at(fn, params, sequences, loss)
        nature = everyone.from_first("what was seen of the model", lambda: nature)
        assert nature is not None  # rank 0 has seen it, or it was known
        mine = _share(len(sequences), everyone)
        found = _surveyed(fn, params, sequences, loss, mine, first, nature, new=known is None, checked=checked)
    tokens = _of_all(everyone, found, next(iter(params.values())).device)
    if tokens.loss.numel() == 0:
        raise ValueError(
            f"no valid token in {len(sequences)} sequences: a token counts if its target is not -100 and its position "
            "and its target's position are attended to; a causal model needs at least two tokens a sequence"
        )
    if first is not None and not checked:
        _check_again(fn, params, sequences, loss, first, nature)
    tokens, dropped = _finite(tokens, drop_nonfinite)
    return Surveyed(tokens=tokens, num_dropped=dropped, nature=nature)


def _share(count: int, everyone: Everyone) -> range:
    """The sequences that this rank runs: adjacent ones, of which many have the same shape."""
    size = min(everyone.size, max(1, count // FEWEST_TOGETHER))
    first, stop = (min(rank, size) * count // size for rank in (everyone.rank, everyone.rank + 1))
    return range(first, stop)


def _of_all(everyone: Everyone, found: Sequence[Tokens], device: torch.device) -> Tokens:
    """The tokens that all ranks have found, in the order of their sequences."""
    if everyone.size == 1:
        return concatenated(found)
    each = everyone.gathered("tokens", [concatenated(found).map(Tensor.cpu)] if found else [])
    return concatenated([tokens for some in each for tokens in some]).map(lambda column: column.to(device))


@dataclass(frozen=True, kw_only=True)
class _First:
    """The sequence that was looked at first, and its tokens."""

    number: int
    tokens: Tokens


def _looked_at(fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss) -> tuple[_First, Nature]:
    """Run the largest sequence, and look at what the model does, and saves if all parameters have gradients.

    Of a model whose data choose what they pass through, the next sequences are tried where it depends on no parameter.
    """
    everything = {**fn.frozen, **fn.params, **params}
    leaves = leaves_of({name: p for name, p in everything.items() if has_gradient(p)})
    chosen, saved_bytes = {name: leaves[name] for name in params}, 0
    order = sorted(range(len(sequences)), key=sequences.num_entries, reverse=True)[:MOST_LOOKED_AT]
    with Observed(coarsest(*(p.dtype for p in params.values()))) as seen:
        for number in order:
            with SavedBytes() as saved:
                tokens, losses = _tokens(fn, leaves, sequences[number], loss, number)
            saved_bytes = max(saved_bytes, saved.total)
            if reaches(losses, chosen):
                break
    check_reach(losses, chosen, leaves, of=f"the {len(order)} largest sequences, of {len(sequences)},")
    return _First(number=number, tokens=tokens), replace(seen.nature, saved_bytes=saved_bytes)


def _check_again(
    fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss, first: _First, nature: Nature
) -> None:
    """Raise where the first sequence, run again, has other losses, reaches what the call before left, or fails."""
    leaves = leaves_of(params)
    with torch.enable_grad():
        again, losses = _tokens(fn, leaves, sequences[first.number], loss, first.number)
    if not same_losses(first.tokens.loss, again.loss, nature):
        raise ValueError(goes_on(first.number))
    check_left_behind(losses, leaves)
    check_backward(losses, leaves)


def _surveyed(
    fn: ModelFunction,
    params: Params,
    sequences: Sequences,
    loss: TokenLoss,
    mine: range,
    first: _First | None,
    nature: Nature,
    *,
    new: bool,
    checked: bool,
) -> list[Tokens]:
    """Sequence by sequence; many of one shape, or any of a known model, together where each has the same losses alone.

    Of few sequences of a new model each is held against the user's own batches, as what a sum over a batch decides may
    show in one that is alone, or beside one without a token; and where no check follows against all together, as the
    pass has them.
    """
    found: list[Tokens] = []
    run = partial(_together, fn, params, sequences, loss)
    holds = partial(_holds_until_checked, first, nature) if checked else partial(_holds, run, nature, new=new)
    for group in neighbours(mine, sequences, most_together(nature)):
        several = len(group) > 1 and not (loss.each_alone or nature.draws)
        few = new and len(group) < FEWEST_TOGETHER
        if several and checked and _of_a_user(loss):
            _check_valid(sequences, loss, group)
        together = _merged(map(run, _spread(group) if checked else [group])) if several and not few else None
        if together is not None and holds(group, together):
            found.append(together)
            continue
        each = {
            number: first.tokens
            if first is not None and number == first.number
            else _tokens(fn, leaves_of(params), sequences[number], loss, number)[0]
            for number in group
        }
        if together is not None:
            check_apart(concatenated(list(each.values())), together, loss, nature, group)
        for part in _batches(sequences, group, checked=checked) if several and few else ():
            together = run(part)
            if together is not None:
                check_apart(concatenated([each[number] for number in part]), together, loss, nature, part)
        found += each.values()
    return found


def _batches(sequences: Sequences, group: Sequence[int], *, checked: bool) -> list[Sequence[int]]:
    """The user's own batches in a group, but those of one sequence; all of it where there is no other, or no check."""
    own: list[Sequence[int]] = [list(some) for _, some in groupby(group, key=sequences.batch_of)]
    own = [some for some in own if len(some) > 1]
    return own if own and (checked or own == [list(group)]) else [*own, group]


def _spread(group: Sequence[int]) -> list[Sequence[int]]:
    """A group in parts of every k-th member: those that are together here are in different companies of the check."""
    count = min(PARTS, max(2, -(-len(group) // 2)))
    return [group[first::count] for first in range(count)]


def _merged(parts: Iterable[Tokens | None]) -> Tokens | None:
    """The tokens of all parts in the order of their sequences; None where a part has none to give."""
    found: list[Tokens] = []
    for part in parts:
        if part is None:
            return None
        found.append(part)
    if len(found) == 1:
        return found[0]
    tokens = concatenated(found)
    return tokens.select(tokens.sequence.argsort(stable=True))


def most_together(nature: Nature) -> int:
    """Return how many sequences run together at most.

    Args:
        nature: What was seen of the model.
    """
    return max(FEWEST, min(MOST_TOGETHER, BYTES_TOGETHER // max(nature.saved_bytes, 1)))


def _together(
    fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss, group: Sequence[int]
) -> Tokens | None:
    """The tokens of a group from one pass; None where the model refuses it."""
    try:
        values, valid, targets = _evaluated(fn, leaves_of(params), sequences.joined(group), loss, group[0])
    except REFUSALS:  # one at a time then, which finds what is wrong, and where
        return None
    if values.shape != valid.shape or len(values) != len(group):
        return None
    row, position = valid.nonzero().unbind(dim=1)
    sequence = torch.tensor(list(group), device=row.device)[row]
    target = None if targets is None else targets[row, position]
    return Tokens(sequence=sequence, position=position, loss=values.detach()[valid], target=target)


Run = Callable[[Sequence[int]], Tokens | None]
"""Some sequences → their tokens, where they run together; None where the model refuses them."""


def _holds(run: Run, nature: Nature, group: Sequence[int], together: Tokens, *, new: bool) -> bool:
    """Whether a group of a new model has the same losses in random parts, one of a known model in half of it.

    Another batch may couple what the one before did not.
    """
    for part in [group[:1], *_random_parts(group, PARTS)] if new else _random_parts(group, 2)[-1:]:
        here = run(part)
        if here is None or not same_losses(here.loss, together.loss[_of(part, together)], nature):
            return False
    return True


def _holds_until_checked(first: _First | None, nature: Nature, group: Sequence[int], together: Tokens) -> bool:
    """Whether the losses that no check will see are right: of the first sequence, and those that are not finite.

    These may have become so beside others.
    """
    if not bool(together.loss.isfinite().all()):
        return False
    if first is None or first.number not in group:
        return True
    return same_losses(first.tokens.loss, together.loss[_of([first.number], together)], nature)


def _check_valid(sequences: Sequences, loss: TokenLoss, group: Sequence[int]) -> None:
    """Raise where other tokens count of a group than of each of its sequences."""
    valid = loss.valid(sequences.joined(group))
    if valid is None:
        return
    for row, member in zip(valid, group, strict=True):
        alone = loss.valid(sequences[member])
        if alone is None or not torch.equal(alone[0], row):
            raise ValueError(f"which tokens of sequence {member} count is another beside others: {samples_meet(loss)}")


def _of_a_user(loss: TokenLoss) -> bool:
    """Whether which tokens count is not known to be said sample by sample."""
    return loss.distribution == "custom" or not getattr(loss.valid, "__module__", "").startswith("fisherfunc")


def _of(part: Sequence[int], tokens: Tokens) -> Bool[Tensor, " n"]:
    return torch.isin(tokens.sequence, torch.tensor(part, device=tokens.sequence.device))


def _random_parts(group: Sequence[int], count: int) -> list[list[int]]:
    """A group in parts at random, the smaller ones last, each in ascending order; the first member is the seed."""
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(group[0]), device="cpu")
    return [[group[i] for i in part.sort().values.tolist()] for part in order.tensor_split(count)]


def _tokens(
    fn: ModelFunction, params: Params, batch: Batch, loss: TokenLoss, index: int
) -> tuple[Tokens, Float[Tensor, "1 s"]]:
    """The tokens of one sequence, and the losses at all of its positions, in the graph where there is one."""
    values, valid, targets = _evaluated(fn, params, batch, loss, index)
    if values.shape != valid.shape or values.ndim != 2 or values.shape[0] != 1:
        raise ValueError(
            f"loss {loss.name!r} expected losses and mask of one shape (1, s) for sequence {index}, "
            f"got {tuple(values.shape)} and {tuple(valid.shape)}"
        )
    position = valid[0].nonzero().squeeze(-1)
    target = None if targets is None else targets[0, position]
    sequence = torch.full_like(position, index)
    return Tokens(sequence=sequence, position=position, loss=values.detach()[0, position], target=target), values


def _evaluated(
    fn: ModelFunction, params: Params, batch: Batch, loss: TokenLoss, index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, which of them count, and the classes that are their targets."""
    targets = loss.targets(batch)
    predictions = loss.predictions(_output(fn, params, batch, index), batch)
    _check(predictions, targets, loss, index)
    values = loss.negative_log_likelihood(predictions, targets)
    valid = loss.valid(batch)
    valid = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    classes = targets if loss.distribution == "categorical" else None
    return values, valid, classes


def _output(fn: ModelFunction, params: Params, sequence: Batch, index: int) -> Any:
    try:
        return fn.apply(params, sequence)
    except IndexError as error:
        raise ValueError(
            f"the model failed on sequence {index} with IndexError: {error}; an input id beyond the vocabulary, or a "
            "sequence longer than the position table, does this"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (*REFUSALS, OSError, StopIteration) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"the model failed on sequence {index}, which runs alone, as a batch of one, with {type(error).__name__}: "
            f"{error}{others_than_tensors(sequence)}{_OFFSETS if 'offsets[0]' in str(error) else ''}"
        ) from error


def _check(predictions: Tensor, targets: Tensor | None, loss: TokenLoss, index: int) -> None:
    if targets is None:
        return
    categorical = loss.distribution == "categorical"
    expected = (*targets.shape, predictions.shape[-1]) if categorical else tuple(targets.shape)
    if tuple(predictions.shape) != expected:
        raise ValueError(
            f"loss {loss.name!r}: sequence {index} has predictions of shape {tuple(predictions.shape)} and targets of "
            f"shape {tuple(targets.shape)}; expected predictions of shape {expected}"
        )
    if categorical:
        _check_range(targets, predictions.shape[-1], loss, index)


def _check_range(targets: Tensor, num_classes: int, loss: TokenLoss, index: int) -> None:
    if targets.is_floating_point():
        raise ValueError(f"loss {loss.name!r} expected class targets of an integer dtype, got {targets.dtype}")
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= num_classes))
    if bool(wrong.any()):
        position = int(wrong[0].nonzero()[0, 0])
        raise ValueError(
            f"target {int(targets[0, position])} at sequence {index}, position {position} is out of range: "
            f"expected 0 to {num_classes - 1}, or -100 for none"
        )


def _finite(tokens: Tokens, drop_nonfinite: bool) -> tuple[Tokens, int]:
    finite = tokens.loss.isfinite()
    dropped = int((~finite).sum())
    if dropped and not drop_nonfinite:
        row = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"the loss is {tokens.loss[row].item()} at sequence {int(tokens.sequence[row])}, position "
            f"{int(tokens.position[row])} ({dropped} such tokens of {len(finite)}); "
            "drop_nonfinite=True leaves them out and counts them"
        )
    if dropped == len(finite):
        raise ValueError(f"the loss of all {dropped} tokens is not finite; check the model's weights and dtype")
    return tokens.select(finite.nonzero().squeeze(-1)), dropped
