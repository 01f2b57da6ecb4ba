"""One forward pass of every sequence, before any gradient: which tokens there are, and their losses.

Errors that a long run would meet late (no valid token, targets out of range, a loss that is not finite) are found here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.distributed.collectives import Everyone, Ranks
from fisherfunc.gradients.batches import others_than_tensors
from fisherfunc.gradients.losses import IGNORED, TokenLoss
from fisherfunc.gradients.memory import SavedBytes
from fisherfunc.gradients.model_function import ModelFunction, has_gradient
from fisherfunc.gradients.nature import Nature, Observed, coarsest
from fisherfunc.gradients.pullback import check_reach, leaves_of
from fisherfunc.gradients.refusals import REFUSALS
from fisherfunc.gradients.sequences import Sequences
from fisherfunc.gradients.stacks import neighbours
from fisherfunc.linalg.tokens import Tokens, concatenated
from fisherfunc.records.axes import Batch, Params

MOST_TOGETHER = 2048
FEWEST_TOGETHER = 16
"""Of fewer sequences, each is run alone as well."""
FEWEST = 2
"""What runs together at the least, to see whether its sequences reach each other."""
BYTES_TOGETHER = 2**26
"""What sequences that run together would save for a backward pass, at most, with their predictions."""
ROUNDING = 1024
"""In eps: what a loss may lose of its own, as it is a difference of logits, where little is left of these."""
PARTS = 8
"""How many random parts of a group run without each other, to see whether its sequences reach each other."""

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
    everyone: Everyone | None = None,
) -> Surveyed:
    """Find the valid tokens and their losses.

    Cost: two forward passes, one and a half where the model is known, and one of a sequence. Of ranks each runs its
    share, of enough sequences that they still meet in batches; rank 0 alone looks at the model.

    All of them have a graph, as in the pass: a model or a loss may compute something else without. Of one that is not
    known the largest sequence is run first, and again at the end with a backward pass (`check_reach`).

    Args:
        fn: The model.
        params: Where to evaluate it.
        sequences: One-sequence batches.
        loss: The token loss.
        drop_nonfinite: Whether to leave out tokens whose loss is not finite, rather than raise.
        known: What was seen of the model on a batch of the same shapes.
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
        found = _surveyed(fn, params, sequences, loss, mine, first, nature, new=known is None)
    tokens = _of_all(everyone, found, next(iter(params.values())).device)
    if tokens.loss.numel() == 0:
        raise ValueError(
            f"no valid token in {len(sequences)} sequences: a token counts if its target is not -100 and its position "
            "and its target's position are attended to; a causal model needs at least two tokens a sequence"
        )
    if first is not None:
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
    """Run the largest sequence, and look at what the model does, and saves if all parameters have gradients."""
    number = max(range(len(sequences)), key=sequences.num_entries)
    everything = {**fn.frozen, **fn.params, **params}
    leaves = leaves_of({name: p for name, p in everything.items() if has_gradient(p)})
    with Observed(coarsest(*(p.dtype for p in params.values()))) as seen, SavedBytes() as saved:
        tokens, losses = _tokens(fn, leaves, sequences[number], loss, number)
    del losses
    return _First(number=number, tokens=tokens), replace(seen.nature, saved_bytes=saved.total)


def _check_again(
    fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss, first: _First, nature: Nature
) -> None:
    """Raise where the first sequence has other losses when it runs again, or gradients would miss something."""
    leaves = leaves_of(params)
    with torch.enable_grad():
        again, losses = _tokens(fn, leaves, sequences[first.number], loss, first.number)
    if not _same(first.tokens.loss, again.loss, nature):
        raise ValueError(
            f"sequence {first.number} has other losses when it runs again, where each call starts from the module as "
            "it was given: the model, or the loss, goes on from what it keeps elsewhere (in a class, a closure, a "
            "function); keep that in attributes of the module, or start it afresh in forward"
        )
    check_reach(losses[0], leaves)


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
) -> list[Tokens]:
    """Sequence by sequence; many small ones of one shape together, where that gives the losses that each has alone.

    Of a model that is not new any number of them runs together, if half of them give the same.
    """
    found: list[Tokens] = []
    run = partial(_together, fn, params, sequences, loss)
    width = max(FEWEST, min(MOST_TOGETHER, BYTES_TOGETHER // max(nature.saved_bytes, 1)))
    for group in neighbours(mine, sequences, width):
        together = None
        if len(group) > 1 and not (loss.each_alone or nature.draws):
            together = run(group)
        holds = _is_sound if new else _holds_in_half
        many = len(group) >= FEWEST_TOGETHER or not new
        if together is not None and many and holds(run, group, together, nature):
            found.append(together)
            continue
        each = [
            first.tokens
            if first is not None and number == first.number
            else _tokens(fn, leaves_of(params), sequences[number], loss, number)[0]
            for number in group
        ]
        if together is not None:
            _check_apart(concatenated(each), together, loss, nature, group)
        found += each
    return found


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


def _is_sound(run: Run, group: Sequence[int], together: Tokens, nature: Nature) -> bool:
    """Whether the first, and random parts of a group, have the same losses without the others."""
    found = [run(part) for part in (group[:1], *_random_parts(group, PARTS))]
    ran = [tokens for tokens in found if tokens is not None]
    if len(ran) < len(found):
        return False
    alone, *others = ran
    each = concatenated(others)
    losses = each.loss[each.sequence.argsort(stable=True)]
    return _same(losses, together.loss, nature) and _same(alone.loss, together.loss[: len(alone.loss)], nature)


def _holds_in_half(run: Run, group: Sequence[int], together: Tokens, nature: Nature) -> bool:
    """Whether a random half of a group has the same losses without the other: a batch may couple what others do not."""
    part = _random_parts(group, 2)[-1]
    half = run(part)
    if half is None:
        return False
    rows = torch.isin(together.sequence, torch.tensor(part, device=together.sequence.device))
    return _same(half.loss, together.loss[rows], nature)


def _random_parts(group: Sequence[int], count: int) -> list[list[int]]:
    """A group in parts at random, the smaller ones last, each in ascending order; the first member is the seed."""
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(group[0]), device="cpu")
    return [[group[i] for i in part.sort().values.tolist()] for part in order.tensor_split(count)]


def _check_apart(each: Tokens, together: Tokens, loss: TokenLoss, nature: Nature, group: Sequence[int]) -> None:
    """Raise where the losses of sequences that run together are not those that each has alone."""
    if _same(each.loss, together.loss, nature):
        return
    if each.loss.shape != together.loss.shape:
        told = f"{len(together.loss)} tokens count in the batch and {len(each.loss)} of each alone"
    else:
        row = int((each.loss - together.loss).abs().nan_to_num().argmax())
        told = (
            f"at sequence {int(each.sequence[row])}, position {int(each.position[row])} it is "
            f"{together.loss[row].item():.6g} in the batch and {each.loss[row].item():.6g} alone"
        )
    raise ValueError(f"of sequences {group[0]} to {group[-1]}, {told}: {samples_meet(loss)}")


def samples_meet(loss: TokenLoss) -> str:
    """Say what it means that a batch has other losses, or gradients, than each of its samples alone."""
    return (
        f"the samples of a batch depend on each other, in the model or in the loss {loss.name!r}, so that a token's "
        "gradient in the batch is not that of its sample alone, which is what is computed; "
        "loss=ff.losses.each_alone(loss) says that each sample alone is meant"
    )


def _same(alone: Tensor, here: Tensor, nature: Nature) -> bool:
    """Whether losses agree within what rounding does, all together: a tie of a router may be decided otherwise."""
    if alone.shape != here.shape:
        return False
    finite = alone.isfinite()
    if bool((finite != here.isfinite()).any()):
        return False
    alone, here = alone[finite].double(), here[finite].double()
    size = torch.linalg.vector_norm(alone).maximum(torch.linalg.vector_norm(here))
    eps = torch.finfo(nature.precision).eps
    return bool(torch.linalg.vector_norm(alone - here) <= eps**0.5 * size + ROUNDING * eps * len(alone) ** 0.5)


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
