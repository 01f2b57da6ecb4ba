"""A fault of torch for a batch of one, worked around: the cotangents of normalisations are made contiguous.

On a CPU torch 2.13 reads the cotangent of `batch_norm` in evaluation mode, and of `instance_norm`, by wrong strides
where it has an axis of length one and comes through `flatten(2).transpose(1, 2)`, as in the patch embeddings of hybrid
vision transformers: gradients are off by their own size, and for two samples they are right.
tests/models/calls/test_batch_of_one.py fails when that has an end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

NORMALISATIONS = {functional.batch_norm, torch.batch_norm, functional.instance_norm, torch.instance_norm}


class ContiguousCotangents(TorchFunctionMode):
    """Inside, what comes back to a normalisation is contiguous."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; what a normalisation returns goes through an identity."""
        result = func(*args, **(kwargs or {}))
        return _Identity.apply(result) if func in NORMALISATIONS else result


class _Identity(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clone()  # no view: models write to what a normalisation returns

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        return cotangent.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.clone()
