"""What the inputs of a model are cast to, and how many of them are pulled."""

from collections.abc import Callable
from dataclasses import replace

import torch

from fisherfunc.gradients.batches import cast
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.model_function import ModelFunction, has_gradient
from fisherfunc.gradients.prepare import pulled
from fisherfunc.gradients.sources import Gathered
from fisherfunc.records.axes import Batch


def input_dtype(fn: ModelFunction) -> torch.dtype | None:
    """What floating-point inputs are cast to: the dtype of the parameters, or None where these differ."""
    dtypes = {t.dtype for t in (fn.params | fn.frozen).values() if has_gradient(t)}
    return next(iter(dtypes)) if len(dtypes) == 1 else None


def inputs_of(
    fn: ModelFunction, batch: Batch, num_tokens: int | None, loss_of: Callable[[list[Batch]], TokenLoss]
) -> Gathered:
    """Return the batches that a run is over, cast to the dtype and device of the model.

    Args:
        fn: The model.
        batch: What a user gives.
        num_tokens: How many tokens are needed; all where None.
        loss_of: The first batches, cast → the loss that says which tokens count.
    """

    def own(batches: Batch) -> list[Batch]:
        return cast(batches, dtype=input_dtype(fn), device=next(iter(fn.params.values())).device)

    data = pulled(batch, num_tokens, lambda first: loss_of(own(first)))
    return replace(data, batches=own(data.batches))
