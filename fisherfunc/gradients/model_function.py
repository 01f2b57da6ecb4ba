"""A model as a pure function of its parameters."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.record import record

Plain = Callable[[dict[str, Tensor], Collection[str]], tuple[dict[str, Tensor], Callable[[Batch], Any]]]


@record(static=("call", "name", "plain"))
class ModelFunction:
    """`apply(params, batch) → output`, with the tensors it depends on.

    Attributes:
        params: The parameters to differentiate by; a tied tensor appears once.
        frozen: The other parameters.
        buffers: The buffers.
        call: (all tensors by name, batch) → output; it writes to none of them.
        name: The class of the model.
        plain: (all tensors by name, those to differentiate by) → these as parameters of a fresh copy of the module, and
            an ordinary call of that copy: batch → output. What passes are held against; `call` where None.
    """

    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    call: Callable[[dict[str, Tensor], Batch], Any]
    name: str
    plain: Plain | None = None

    def apply(self, params: Params, batch: Batch) -> Any:
        """The model's output on a batch at these parameters; those not given are the model's own."""
        return self.call(self._everything(params), batch)

    def ordinary_call(
        self, params: Params, wanted: Collection[str]
    ) -> tuple[dict[str, Tensor], Callable[[Batch], Any]]:
        """Prepare one ordinary call at these parameters, on a copy of the module of its own, to differentiate by some.

        Args:
            params: Those that are not given are the model's own.
            wanted: The names of those to differentiate by.

        Returns:
            These as leaves of the graph to come, and batch → output.
        """
        if self.plain is not None:
            return self.plain(self._everything(params), wanted)
        leaves = {name: params[name].detach().requires_grad_() for name in wanted}
        return leaves, lambda batch: self.apply({**params, **leaves}, batch)

    def _everything(self, params: Params) -> dict[str, Tensor]:
        return {**self.frozen, **self.params, **self.buffers, **params}

    def at(self, params: Params) -> dict[str, Tensor]:
        """Parameters to differentiate by, detached from whatever computed them.

        Raises:
            ValueError: If there are none, or one is not a parameter of the model, or has another shape.
        """
        if not params:
            raise ValueError("params is empty; expected at least one parameter, such as those of fn.params")
        own = {**self.frozen, **self.params}
        for name, value in params.items():
            if name not in own:
                raise ValueError(f"params has {name!r}, which {self.name} has not; it has {list(own)}")
            if value.shape != own[name].shape:
                raise ValueError(
                    f"params[{name!r}] has shape {tuple(value.shape)}, expected {tuple(own[name].shape)} "
                    f"as in {self.name}"
                )
        return {name: ordinary(value) for name, value in params.items()}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "ModelFunction":
        """The same function with its floating-point tensors in `dtype`, all of them on `device`.

        Raises:
            ValueError: If `dtype` is not a floating-point one.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype expected a floating-point dtype such as torch.float64, got {dtype}")

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: t.to(device=device, dtype=dtype if t.is_floating_point() else None) for name, t in tensors.items()
            }

        return replace(self, params=moved(self.params), frozen=moved(self.frozen), buffers=moved(self.buffers))


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor outside any graph; a copy where it was made in inference mode, as autograd takes none of those."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
