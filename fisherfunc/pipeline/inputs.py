"""What the inputs of a model are cast to, and how many of them are pulled."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction, has_gradient
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.data.batches import cast, targets_of
from fisherfunc.gradients.data.sequences import split
from fisherfunc.gradients.data.sources import Gathered
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.survey.prepare import pulled
from fisherfunc.records.axes import Batch
from fisherfunc.records.containers import flattened


def input_dtype(fn: ModelFunction) -> torch.dtype | None:
    """What floating-point inputs are cast to: the dtype of the parameters, or None where these differ."""
    dtypes = {t.dtype for t in (fn.params | fn.frozen).values() if has_gradient(t)}
    return next(iter(dtypes)) if len(dtypes) == 1 else None


def _takes(fn: ModelFunction, batches: list[Batch]) -> bool:
    """Whether the model runs on inputs as they are, where these have another dtype than its parameters."""
    dtype = input_dtype(fn)
    leaves = [leaf for batch in batches for _, leaf in flattened(batch) if leaf is not targets_of(batch)]
    if all(leaf.dtype == dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()):
        return False  # nothing but targets is left to be cast
    _, run = fn.ordinary_call(fn.params, [])
    try:
        with torch.no_grad():
            run(split(batches)[0])
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:
        return False
    return True


def inputs_of(
    fn: ModelFunction, batch: Batch, num_tokens: int | None, loss_of: Callable[[list[Batch]], TokenLoss]
) -> Gathered:
    """Return the batches that a run is over, on the device of the model, and in its dtype where it needs that.

    A model that takes the inputs as they are may count on it: of the time step 999 bfloat16 makes 1000. Cost: a forward
    pass of a sequence, where floating-point inputs have another dtype.

    Args:
        fn: The model.
        batch: What a user gives.
        num_tokens: How many tokens are needed; all where None.
        loss_of: The first batches, cast → the loss that says which tokens count.
    """
    device = next(iter(fn.params.values())).device
    decided: list[torch.dtype | None] = []

    def own(batches: Batch) -> list[Batch]:
        as_given = cast(batches, dtype=None, device=device)
        if not decided:
            decided.append(None if _takes(fn, as_given) else input_dtype(fn))
        return cast(as_given, dtype=decided[0], device=device)

    data = pulled(batch, num_tokens, lambda first: loss_of(own(first)))
    return replace(data, batches=own(data.batches))
