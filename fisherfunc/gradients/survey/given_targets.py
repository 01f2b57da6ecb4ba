"""Whether the targets of a batch are the model's too: given to one whose predictions differ by them, and to no other.

A margin head, a decoder that reads its targets shifted, a `forward` that gives other logits without targets need them.
A model that has a loss of its own beside its predictions does not: it would be computed for nothing, and may fail.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from traceback import walk_tb

from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.data.batches import targets_of
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.rows.stacks import neighbours
from fisherfunc.gradients.survey.predictions import Unusable, equal, fit, outcome, predicted, variants
from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.containers import mapped

MOST_TOGETHER = 32
MOST_TARGETS = 256
"""How many sequences, and targets of theirs, are run together, to see whether the model uses these."""


def with_targets(fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss) -> ModelFunction:
    """The model, given the targets where its predictions differ by them, or it has none without."""
    if fn.given_targets is None:
        return fn
    if fn.given_targets is fn.call:  # they are required
        groups = _of_all_targets(sequences, of_samples=True)
        sees = any(_changed(fn, fn, params, *_with_other_targets(sequences.joined(group)), loss) for group in groups)
        return replace(fn, given_targets=None, sees_class=sees)
    without, given = variants(fn)
    looked_at = [sequences[number] for number in sorted({0, len(sequences) - 1})]
    uses = [_uses(without, given, params, one, loss) for one in looked_at if targets_of(one) is not None]
    by_class, by_position = (
        any(
            _differ(without, given, params, sequences, group, loss)
            for group in _of_all_targets(sequences, of_samples=of_samples)
        )
        for of_samples in (True, False)
    )
    return replace(given, sees_class=by_class) if by_class or by_position or any(uses) else without


def _of_all_targets(sequences: Sequences, *, of_samples: bool) -> Iterator[list[int]]:
    """Groups of sequences that have all the targets there are between them: a margin may be that of one class alone.

    Args:
        sequences: All of them.
        of_samples: Whether those with one target are meant, or those with several.
    """
    seen: set[float] = set()
    members, first, most = [], 0, 1
    for part in sequences.parts:
        targets = targets_of(part.batch)
        if isinstance(targets, Tensor) and targets.ndim and (targets.ndim == 1) == of_samples:
            for row, of_row in enumerate(targets.reshape(part.count, -1).tolist()):
                if not seen.issuperset(of_row):
                    seen.update(of_row)
                    members.append(first + row)
                    most = max(most, len(of_row))
        first += part.count
    return neighbours(members, sequences, min(MOST_TOGETHER, max(1, MOST_TARGETS // most)))


def _with_other_targets(batch: Batch) -> tuple[Batch, Batch]:
    """A batch, and the same with each sequence's targets those of its neighbour."""
    targets = targets_of(batch)
    return batch, mapped(lambda leaf: leaf.roll(1, 0) if leaf is targets else leaf, batch)


def _changed(
    one: ModelFunction, other: ModelFunction, params: Params, batch: Batch, its_batch: Batch, loss: TokenLoss
) -> bool | None:
    """Whether two models, or one on two batches, have other predictions; None where one of them has none."""
    plain, beside = predicted(one, params, batch, loss), predicted(other, params, its_batch, loss)
    if isinstance(plain, Exception) or isinstance(beside, Exception) or plain.shape != beside.shape:
        return None
    return not equal(plain, beside)


def _differ(
    one: ModelFunction,
    other: ModelFunction,
    params: Params,
    sequences: Sequences,
    group: Sequence[int],
    loss: TokenLoss,
) -> bool:
    """Whether two models have other predictions of some sequences, one by one where they do not run together."""
    batch = sequences.joined(group)
    changed = _changed(one, other, params, batch, batch, loss)
    if changed is None and len(group) > 1:
        return any(_differ(one, other, params, sequences, [number], loss) for number in group)
    return bool(changed)


def _uses(without: ModelFunction, given: ModelFunction, params: Params, sequence: Batch, loss: TokenLoss) -> bool:
    """Whether predictions of one sequence fit the loss, or are others, where the model has the targets."""
    plain, beside = (predicted(fn, params, sequence, loss) for fn in (without, given))
    if isinstance(beside, Unusable) or not fit(plain, sequence, loss):
        return fit(beside, sequence, loss)
    if isinstance(beside, Exception):
        if loss.distribution == "gaussian" or _in_a_loss(beside):
            return False
        raise ValueError(
            f"the model's forward takes the targets of the batch, and failed when it got them ({outcome(beside)}), "
            "so whether its predictions depend on them cannot be seen; give targets that it takes (labels.long()?), "
            "or, if they are for the loss alone, a wrapper of the model whose forward has no such argument"
        ) from beside
    return fit(beside, sequence, loss) and not equal(plain, beside)


def _in_a_loss(error: Exception) -> bool:
    """Whether a model failed in a loss of its own, or as nothing inside takes the argument."""
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return True
    codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    return any("loss" in code.co_name.lower() or "cross_entropy" in code.co_name for code in codes) or any(
        code.co_filename.endswith(("loss.py", "loss_utils.py")) for code in codes
    )
