"""A model as a pure function of its parameters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.record import record


@record(static=("call", "name"))
class ModelFunction:
    """`apply(params, batch) → output`, with the tensors it depends on.

    Attributes:
        params: The parameters to differentiate by; a tied tensor appears once.
        frozen: The other parameters.
        buffers: The buffers; each call works on copies, so a model that writes them changes nothing.
        call: (all tensors by name, batch) → output.
        name: The class of the model.
    """

    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    call: Callable[[dict[str, Tensor], Batch], Any]
    name: str

    def apply(self, params: Params, batch: Batch) -> Any:
        """The model's output on a batch at these parameters; those not given are the model's own."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return self.call({**self.frozen, **self.params, **buffers, **params}, batch)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "ModelFunction":
        """The same function with its floating-point tensors in `dtype`, all of them on `device`."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for name, t in tensors.items()
            }

        return replace(self, params=moved(self.params), frozen=moved(self.frozen), buffers=moved(self.buffers))
