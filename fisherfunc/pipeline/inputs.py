"""What the inputs of a model are cast to."""

import torch

from fisherfunc.gradients.model_function import ModelFunction


def input_dtype(fn: ModelFunction) -> torch.dtype | None:
    """What floating-point inputs are cast to: the dtype of the parameters, or None where these differ."""
    dtypes = {t.dtype for t in (fn.params | fn.frozen).values() if t.is_floating_point()}
    return next(iter(dtypes)) if len(dtypes) == 1 else None
