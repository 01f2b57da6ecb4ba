"""A model as a pure function of its parameters."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fisherfunc.records.axes import Batch, Params
from fisherfunc.records.record import record

Call = Callable[[dict[str, Tensor], Batch], Any]
"""(all tensors by name, batch) → output; it writes to none of them."""
Ordinary = Callable[[dict[str, Tensor], Collection[str]], tuple[dict[str, Tensor], Callable[[Batch], Any]]]
"""(all tensors by name, the names of some) → these as parameters of a fresh copy of the module, and a call of that."""


@dataclass(frozen=True, eq=False)
class Calls:
    """How a model is called.

    Attributes:
        passes: By passes.
        ordinary: As by a user, once: what passes are held against.
    """

    passes: Call
    ordinary: Ordinary

    def __call__(self, tensors: dict[str, Tensor], batch: Batch) -> Any:
        """The output of a call by passes."""
        return self.passes(tensors, batch)


def around(
    call: Call, *, batch: Callable[[Any], Batch] = lambda one: one, output: Callable[[Any], Any] = lambda one: one
) -> Call:
    """A call that takes something else than the batch, or gives something else than the output.

    Args:
        call: The call.
        batch: What it takes → the batch.
        output: The output → what it gives.
    """

    def passes(tensors: dict[str, Tensor], one: Any) -> Any:
        return output(call(tensors, batch(one)))

    def ordinary(tensors: dict[str, Tensor], wanted: Collection[str]) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        assert isinstance(call, Calls)
        leaves, run = call.ordinary(tensors, wanted)
        return leaves, lambda one: output(run(batch(one)))

    return Calls(passes, ordinary) if isinstance(call, Calls) else passes


@record(static=("call", "name", "given_targets", "sees_class", "time_first"))
class ModelFunction:
    """`apply(params, batch) → output`, with the tensors it depends on.

    Attributes:
        params: The parameters to differentiate by; a tied tensor appears once.
        frozen: The other parameters.
        buffers: The buffers.
        call: How the model is called.
        name: The class of the model.
        given_targets: `call` with the targets of the batch given to the model, the same where it requires them; None
            where it takes none (see models/arguments.py).
        sees_class: Whether its prediction of a sample depends on the target of that sample, which it is given.
        time_first: The modules in it that take another axis than the first for that of samples.
    """

    params: dict[str, Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    call: Call
    name: str
    given_targets: Call | None = None
    sees_class: bool = False
    time_first: tuple[str, ...] = ()

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
        if isinstance(self.call, Calls):
            return self.call.ordinary(self._everything(params), wanted)
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

        Packed weights keep their dtype: it says how they are stored, not what they mean.

        Raises:
            ValueError: If `dtype` is not a floating-point one, there is no such device, or packed weights would have to
                go to another.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype expected a floating-point dtype such as torch.float64, got {dtype!r}")
        there = None if device is None else _usable(device)

        def moved(tensor: Tensor) -> Tensor:
            as_wide = dtype if has_gradient(tensor) else None
            place = there or tensor.device
            if (tensor.device, tensor.dtype) == (place, as_wide or tensor.dtype):
                return tensor
            if of_own_class(tensor):  # which may pack itself again where it is moved, or leave its scales behind
                raise ValueError(
                    f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} is packed on {tensor.device}; load the "
                    f"model on {place}, then functionalize it"
                )
            return tensor.to(device=place, dtype=as_wide)

        params, frozen, buffers = (
            {name: moved(t) for name, t in tensors.items()} for tensors in (self.params, self.frozen, self.buffers)
        )
        return replace(self, params=params, frozen=frozen, buffers=buffers)


def _usable(device: torch.device | str) -> torch.device:
    """The device as tensors there have it, with its index.

    Raises:
        ValueError: If this machine, or this build of torch, has none such, or nothing there has values.
    """
    try:
        found = torch.empty(0, device=device).device
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} cannot be used: {error}") from error
    if found.type == "meta":
        raise ValueError("device='meta' holds no values; give one that computes, such as 'cpu'")
    return found


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor outside any graph; a copy where it was made in inference mode, as autograd takes none of those."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def has_gradient(tensor: Tensor) -> bool:
    """Whether a gradient by it exists: not by integers, nor by what bitsandbytes packs into floats of any dtype."""
    return tensor.is_floating_point() and getattr(tensor, "quant_state", None) is None


def of_own_class(tensor: Tensor) -> bool:
    """Whether it is of packed weights, by which no gradient exists, in a class of their own, which has their scales."""
    kinds = (Tensor, nn.Parameter, nn.Buffer)
    own = type(tensor) not in kinds and isinstance(tensor, nn.Parameter) and not is_traceable_wrapper_subclass(tensor)
    return own and not has_gradient(tensor)


def packs_integers(tensor: Tensor) -> bool:
    """Whether it is made of other tensors, some of them integers: outwardly floats, as quanto's and torchao's are."""
    if not is_traceable_wrapper_subclass(tensor):
        return False
    outer: Any = tensor
    inner = [getattr(tensor, name) for name in outer.__tensor_flatten__()[0]]
    return any(packs_integers(part) or not part.is_floating_point() for part in inner if isinstance(part, Tensor))


def same_memory(tensor: Tensor, *, requires_grad: bool = False) -> Tensor:
    """The tensor outside any graph, as another object of its class, with copies of what its attributes hold."""
    if not of_own_class(tensor):
        return ordinary(tensor)
    held = vars(tensor)
    memo: dict[int, Any] = {id(value): ordinary(value) for value in held.values() if isinstance(value, Tensor)}
    memo |= {id(value): value for value in held.values() if isinstance(value, nn.Module)}
    made = Tensor._make_subclass(type(tensor), ordinary(tensor), requires_grad)  # type: ignore[attr-defined]
    vars(made).update(copy.deepcopy(held, memo))
    return made
