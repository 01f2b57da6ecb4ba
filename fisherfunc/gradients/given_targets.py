"""Whether the targets of a batch are the model's too: given to one whose predictions differ by them, and to no other.

A margin head, a decoder that reads its targets shifted, a `forward` that gives other logits without targets need them.
A model that has a loss of its own beside its predictions does not: it would be computed for nothing, and may fail.
"""

from dataclasses import replace
from traceback import walk_tb

from torch import Tensor

from fisherfunc.gradients.batches import targets_of
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.model_function import ModelFunction
from fisherfunc.gradients.predictions import Unusable, equal, fit, outcome, predicted, variants
from fisherfunc.gradients.sequences import Sequences
from fisherfunc.gradients.stacks import neighbours
from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.containers import mapped

MOST_CLASSES = 32
"""How many sequences of different targets are run together, to see whether the model uses these."""


def with_targets(fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss) -> ModelFunction:
    """The model, given the targets where its predictions differ by them, or it has none without."""
    if fn.given_targets is None:
        return fn
    if fn.given_targets is fn.call:  # they are required
        rolled = (_with_other_targets(some) for some in _of_many_classes(sequences))
        sees = any(_changed(fn, fn, params, some, loss, other) for some, other in rolled)
        return replace(fn, given_targets=None, sees_class=sees)
    without, given = variants(fn)
    looked_at = [sequences[number] for number in sorted({0, len(sequences) - 1})]
    uses = [_uses(without, given, params, one, loss) for one in looked_at if targets_of(one) is not None]
    by_class = any(_changed(without, given, params, some, loss, some) for some in _of_many_classes(sequences))
    return replace(given, sees_class=by_class) if by_class or any(uses) else without


def _of_many_classes(sequences: Sequences) -> list[Batch]:
    """Sequences with different targets, where each has one: a margin may be that of one class alone."""
    seen: dict[float, int] = {}
    first = 0
    for part in sequences.parts:
        targets = targets_of(part.batch)
        if isinstance(targets, Tensor) and targets.ndim == 1:
            for row, target in enumerate(targets.tolist()):
                seen.setdefault(target, first + row)
        first += part.count
    members = sorted(list(seen.values())[:MOST_CLASSES])
    return [sequences.joined(group) for group in neighbours(members, sequences, MOST_CLASSES)]


def _with_other_targets(batch: Batch) -> tuple[Batch, Batch]:
    """A batch, and the same with each sequence's targets those of its neighbour."""
    targets = targets_of(batch)
    return batch, mapped(lambda leaf: leaf.roll(1, 0) if leaf is targets else leaf, batch)


def _changed(
    one: ModelFunction, other: ModelFunction, params: Params, batch: Batch, loss: TokenLoss, its_batch: Batch
) -> bool:
    """Whether two models, or one on two batches, have other predictions."""
    plain, beside = predicted(one, params, batch, loss), predicted(other, params, its_batch, loss)
    if isinstance(plain, Exception) or isinstance(beside, Exception) or plain.shape != beside.shape:
        return False
    return not equal(plain, beside)


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
