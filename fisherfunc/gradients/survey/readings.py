"""What of a batch can be read in two ways, read as the model does: by a few forward passes, before any other.

| seen | readings | settled by |
| --- | --- | --- |
| targets, and a `forward` that takes them | given to the model, or for the loss alone | whether predictions differ |
| a list, array or object beside tensors | an entry a sequence, or all for each | which gives what the batch gives |
| one target, inputs with other rows | an axis of samples is added, or not | which the model takes |
| modules with another axis of samples | axis 0 holds samples, or times | whether rows change one another |

What stays unclear is refused, with both readings named.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction, around
from fisherfunc.gradients.data.batches import others_than_tensors, targets_of
from fisherfunc.gradients.data.sequences import Part, Sequences
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.losses.masks import check_masks
from fisherfunc.gradients.survey.given_targets import with_targets
from fisherfunc.gradients.survey.predictions import Predictions, fit, outcome, predicted, same, variants
from fisherfunc.records.axes import Params
from fisherfunc.records.containers import flattened, mapped

MOST_ROWS = 8
"""How many sequences of a batch are run alone, to see which reading gives what they have in the batch."""
MOST_UNCLEAR = 4
"""How many entries of a batch may be unclear: all their readings together are tried."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model reads the targets of a batch in which nothing else is unclear.

    Attributes:
        given: Whether they are given to it, where it need not have them.
        sees_class: Whether its predictions depend on them.
    """

    given: bool
    sees_class: bool


def reading_of(fn: ModelFunction, sequences: Sequences, settled_as: ModelFunction) -> Reading | None:
    """Return how the targets were read; None where more than that was unclear.

    Args:
        fn: The model.
        sequences: The sequences, as they were split.
        settled_as: The model as `settled` gave it.
    """
    if fn.time_first or any(part.unclear or part.bare for part in sequences.parts):
        return None
    return Reading(given=settled_as.call is fn.given_targets, sees_class=settled_as.sees_class)


def _read_as(fn: ModelFunction, reading: Reading) -> ModelFunction:
    if fn.given_targets is None:
        return fn
    without, *given = variants(fn)
    chosen = given[0] if given and reading.given else without
    return replace(chosen, given_targets=None, sees_class=reading.sees_class)


def settled(
    fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss, *, known: Reading | None = None
) -> tuple[ModelFunction, Sequences]:
    """The model and the sequences, with what can be read in two ways read as the model does.

    Cost: nothing where nothing is unclear, or where it is known; where `forward` takes targets that it need not have,
    two forward passes of the sequences that have all targets between them.

    Args:
        fn: The model.
        params: Where to evaluate it.
        sequences: One-sequence batches.
        loss: The token loss.
        known: How the targets of a batch of the same shapes were read.

    Raises:
        ValueError: If both readings are possible and differ, or neither is.
    """
    if loss.distribution == "categorical":
        key = "decoder_attention_mask" if loss.name == "seq2seq_lm" else "attention_mask"
        check_masks([part.batch for part in sequences.parts], key)
    if known is not None and (known.given or fn.given_targets in (None, fn.call)):
        return _read_as(fn, known), sequences
    if known is not None:  # other targets may change predictions, where those of the batch before changed none
        return with_targets(fn, params, sequences, loss), sequences
    fn, sequences = _with_axis(fn, params, sequences, loss)
    sequences = _with_own_entries(fn, params, sequences, loss)
    fn = with_targets(fn, params, sequences, loss)
    _check_axis(fn, params, sequences, loss)
    return fn, sequences


# Lists, arrays and objects.


def _with_own_entries(fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss) -> Sequences:
    """Each list, array or object as one for each sequence, or one for all, whichever gives what the batch gives."""
    unclear = [part for part in sequences.parts if part.unclear]
    if not unclear:
        return sequences
    paths = sorted({path for part in unclear for path in part.unclear})
    if len(paths) > MOST_UNCLEAR:
        raise ValueError(
            f"the batch has {len(paths)} entries that are no tensors, such as {', '.join(paths[:3])}: for each "
            f"sequence its own, or all for each? At most {MOST_UNCLEAR} are tried; give tensors of a row a sequence, "
            "or batches of one sequence"
        )
    largest = max(unclear, key=lambda part: min(part.count, MOST_ROWS))
    divisible = [path for path in paths if all(part.unclear.get(path, True) for part in unclear)]
    likely = [path in largest.own for path in divisible]
    readings = [
        frozenset(path for path, own in zip(divisible, chosen, strict=True) if own)
        for chosen in product(*((first, not first) for first in likely))
    ]
    failed: dict[str, str] = {}
    for own in readings:
        for variant in variants(fn):
            reason = _differs(variant, params, replace(largest, own=own), loss)
            if reason is None:
                return Sequences([_read(part, own) for part in sequences.parts])
            failed.setdefault(_named(paths, own), reason)
    raise ValueError(
        "the batch holds what is no tensor, and no reading of it gives each sequence the predictions that it has in "
        f"the batch: {'; '.join(f'{reading}: {reason}' for reading, reason in failed.items())}. Give a tensor with a "
        "row a sequence, or batches of one sequence each; where samples of a batch depend on each other, none will do"
        f"{others_than_tensors(largest.batch)}"
    )


def _read(part: Part, own: frozenset[str]) -> Part:
    """A part whose unclear entries are read in one way; of one sequence, lists of one entry are its own."""
    return replace(part, own=own, unclear={}) if part.unclear else part


def _named(paths: list[str], own: frozenset[str]) -> str:
    return ", ".join(f"batch{path} {'an entry a sequence' if path in own else 'for all'}" for path in paths)


def _differs(fn: ModelFunction, params: Params, part: Part, loss: TokenLoss) -> str | None:
    """Where sequences alone have other predictions than in the batch, if any has."""
    together = predicted(fn, params, part.batch, loss)
    if isinstance(together, Exception):
        return f"the batch fails with {outcome(together)}"
    for row in _telling_rows(part):
        alone = predicted(fn, params, part.rows(slice(row, row + 1)), loss)
        if len(together) != part.count or not same(together[row : row + 1], alone):
            return f"sequence {row} of {part.count} has {outcome(alone)} alone, which differ from those in the batch"
    return None


def _telling_rows(part: Part) -> list[int]:
    """Rows whose entries differ from one another as far as there are such, then others."""
    held = dict(flattened(part.batch, lambda path, node: path in part.unclear))
    lists = [held[path] for path, own in part.unclear.items() if own]
    distinct = {str([entries[row] for entries in lists]): row for row in reversed(range(part.count))}
    spread = np.linspace(0, part.count - 1, MOST_ROWS).astype(int).tolist()
    return list(dict.fromkeys([*sorted(distinct.values()), *spread]))[:MOST_ROWS]


# Samples without an axis of samples.


def _with_axis(
    fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss
) -> tuple[ModelFunction, Sequences]:
    """Samples that may lack the axis of samples get it, or go to the model as they are."""
    bare = [part for part in sequences.parts if part.bare]
    if not bare:
        return fn, sequences
    ways = {
        "with an axis of samples before their own": (fn, _axis_added),
        "as they are": (fn, lambda part: part),
        "as they are, and its output with an axis of samples": (_axis_added_to_output(fn), lambda part: part),
    }
    fits: dict[str, Predictions] = {}
    failed: dict[str, str] = {}
    for way, (model, read) in ways.items():
        for variant in variants(model):
            sequence = read(bare[0]).batch
            predictions = predicted(variant, params, sequence, loss)
            if fit(predictions, sequence, loss):
                fits.setdefault(way, predictions)
            failed.setdefault(way, outcome(predictions))
    if not fits:
        raise ValueError(
            "the batch has one target, and inputs of other lengths: a sample without an axis of samples? The model "
            f"does not take it so: {'; '.join(f'{way}: {reason}' for way, reason in failed.items())}. Expected a row a "
            "sample of each input and target"
        )
    (way, first), *others = fits.items()
    for other, predictions in others:
        if not same(first.flatten(), predictions.flatten()):  # type: ignore[union-attr]
            raise ValueError(
                f"the batch has one target, and inputs of other lengths: the model takes them {way} and {other}, and "
                "its predictions differ; give each input and target an axis of samples, (1, …)"
            )
    model, read = ways[way]
    return model, Sequences([read(part) if part.bare else part for part in sequences.parts])


def _axis_added(part: Part) -> Part:
    targets = targets_of(part.batch)

    def added(leaf: Any) -> Any:
        return leaf[None] if isinstance(leaf, Tensor | np.ndarray) and leaf is not targets else leaf

    return replace(part, batch=mapped(added, part.batch))


def _axis_added_to_output(fn: ModelFunction) -> ModelFunction:
    def added(output: Any) -> Any:
        return mapped(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, output)

    given = None if fn.given_targets is None else around(fn.given_targets, output=added)
    return replace(fn, call=around(fn.call, output=added), given_targets=given)


# Modules whose samples lie along another axis.


def _check_axis(fn: ModelFunction, params: Params, sequences: Sequences, loss: TokenLoss) -> None:
    """Raise where rows along axis 0 change one another, and a module has its samples along another axis."""
    several = [part for part in sequences.parts if part.count > 1]
    if not fn.time_first or not several:
        return
    count = min(MOST_ROWS, several[0].count)
    rows = replace(several[0], unclear={})
    some = rows.rows(slice(0, count))
    together = predicted(fn, params, some, loss)
    alone = [predicted(fn, params, rows.rows(slice(row, row + 1)), loss) for row in (0, count - 1)]
    if isinstance(together, Exception):  # a number of sequences that the model is not made for
        return
    if any(not same(together[row : row + 1], one) for row, one in zip((0, count - 1), alone, strict=True)):
        raise ValueError(
            f"sequences lie along axis 0 of the batch, and there change each other's predictions, as the model has "
            f"modules with batch_first=False ({', '.join(fn.time_first[:3])}), whose axis 0 is time; pass inputs and "
            "targets with the samples first, to a model that takes them so (batch_first=True, or a forward that "
            "transposes)"
        )
