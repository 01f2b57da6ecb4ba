"""A module as a pure function of its parameters, without touching the module.

Each call runs a copy of its own of the module's structure (isolation.py), in evaluation mode: a dropout mask or a batch
statistic would make a token's gradient depend on chance or on its neighbours. What a model draws at random all the
same, it draws alike in each call, from generators of its own. Forward hooks run, for they may be part of the function;
backward hooks do not, for they cannot be.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fisherfunc.gradients.model_function import ModelFunction, Plain, ordinary
from fisherfunc.gradients.module_calls import is_answered, watch_parts
from fisherfunc.linalg.full_precision import changeable
from fisherfunc.models.batch_of_one import ContiguousCotangents
from fisherfunc.models.isolation import Blueprint, evaluation_copy, fresh_copy, isolated
from fisherfunc.models.recomputation import kept_activations
from fisherfunc.models.writes import Guard
from fisherfunc.records.axes import Batch

Selection = str | Callable[[str], bool] | Iterable[str]
TARGET_KEYS = ("labels", "targets")


@torch.inference_mode(mode=False)
def functionalize(model: nn.Module, *, parameters: Selection = "trainable") -> ModelFunction:
    """A module as `apply(params, batch) → output`, in evaluation mode.

    A mapping is passed as keyword arguments, without its targets; of a tuple all but the last element are passed.
    Tensors are shared with the module: training it afterwards changes `params`.

    Args:
        model: Any module; its mode, flags, hooks, buffers and `.grad` stay as they are.
        parameters: What to differentiate by: "trainable" (`requires_grad`), "all", names or glob patterns, or a
            predicate of the name. A tied tensor is one parameter, under its first name.

    Raises:
        ValueError: If no parameter is left, a pattern matches none, or a parameter is not a materialised real float.
        TypeError: If the model is not a module, is one that torch.func cannot call, or cannot be copied.

    Example:
        >>> fn = functionalize(nn.Linear(2, 3))
        >>> fn.apply(fn.params, (torch.zeros(4, 2), torch.zeros(4, 3))).shape
        torch.Size([4, 3])
    """
    _check_kind(model)
    originals = dict(model.named_parameters())
    for name, parameter in originals.items():
        _check_materialised(name, parameter)
    private = _private_copy(model)
    everything = {name: ordinary(p) for name, p in private.named_parameters() if p.numel()}
    names = _selected(originals, parameters)
    for name in names:
        _check_differentiable(name, everything[name])
    call, plain = _callers(private)
    return ModelFunction(
        params={name: everything[name] for name in names},
        frozen={name: p for name, p in everything.items() if name not in names},
        buffers={name: ordinary(b) for name, b in private.named_buffers()},
        call=call,
        name=type(model).__name__,
        plain=plain,
    )


def _check_kind(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{type(model).__name__} is TorchScript, which torch.func cannot call; pass the Python module")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"{type(model).__name__} wraps the model; pass its .module")


def _private_copy(model: nn.Module) -> nn.Module:
    private: Any = evaluation_copy(model)
    if getattr(getattr(private, "config", None), "_experts_implementation", None) not in (None, "eager"):
        private.set_experts_implementation("eager")  # grouped products have no batching rule, and no float64
    for module in private.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return private


def _selected(parameters: Mapping[str, nn.Parameter], selection: Selection) -> list[str]:
    names = [name for name, p in parameters.items() if p.numel()]
    if selection == "trainable":
        chosen = [name for name in names if parameters[name].requires_grad]
    elif selection == "all":
        chosen = names
    elif callable(selection):
        chosen = [name for name in names if selection(name)]
    else:
        chosen = _matching(names, [selection] if isinstance(selection, str) else list(selection))
    if not chosen:
        raise ValueError(
            f"no parameter left of {len(names)} with parameters={selection!r}: requires_grad is set on "
            f"{sum(p.requires_grad for p in parameters.values())} of them; parameters='all' takes all"
        )
    return chosen


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"parameters={pattern!r} matches none of the {len(names)} parameters, such as {names[:3]}; "
                "expected 'trainable', 'all', names or glob patterns (a tied tensor goes by its first name)"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check_materialised(name: str, parameter: Tensor) -> None:
    if nn.parameter.is_lazy(parameter) or parameter.is_meta:
        raise ValueError(
            f"parameter {name!r} holds no values yet ({type(parameter).__name__} on {parameter.device}); run lazy "
            "modules once, load weights from the meta device"
        )


def _check_differentiable(name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point():
        raise ValueError(
            f"parameter {name!r} is {parameter.dtype}, expected a real float; leave it out by parameters=, or "
            "dequantise integers"
        )


def _callers(private: nn.Module) -> tuple[Callable[[dict[str, Tensor], Batch], Any], Plain]:
    """The calls of passes, and ordinary ones to hold them against."""
    accepted = inspect.signature(private.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in accepted else {}
    recurrent = any(isinstance(module, nn.RNNBase) for module in private.modules())
    blueprint, guard = Blueprint(private), Guard({name for name, _ in private.named_parameters()})
    shapes_seen: set[Any] = set()

    def run(module: nn.Module, batch: Batch, device: torch.device) -> Any:
        arguments, keywords = _arguments(module, isolated(batch))
        with _same_draws(device), _plain_recurrence() if recurrent else nullcontext():
            return module(*arguments, **{**fixed, **keywords})

    def call(tensors: dict[str, Tensor], batch: Batch) -> Any:
        device = next(iter(tensors.values())).device

        def built(given: dict[str, Tensor]) -> Any:
            module = blueprint.build({n: t.clone() if n in blueprint.buffers else t for n, t in given.items()})
            if recorded:
                watch_parts(module)
            sound = ContiguousCotangents() if guard.normalises else nullcontext()
            with sdpa_kernel(SDPBackend.MATH), kept_activations(), sound:
                return run(module, batch, device)

        recorded, shapes = is_answered(), _shapes(batch)
        if recorded or shapes in shapes_seen:
            return guard.unwatched(built, tensors)
        output = guard.watched(built, tensors)
        if torch.is_grad_enabled():  # without gradients a call is a first look, at the values of each sequence
            shapes_seen.add(shapes)
        return output

    def plain(tensors: dict[str, Tensor], wanted: Collection[str]) -> tuple[dict[str, Tensor], Callable[[Batch], Any]]:
        module = fresh_copy(private, guard.writable(tensors), wanted)
        leaves: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if name in wanted}
        return leaves, lambda batch: run(module, batch, next(iter(tensors.values())).device)

    return call, plain


def _shapes(batch: Batch) -> Any:
    leaves, form = pytree.tree_flatten(batch)
    return str(form), tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _arguments(module: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, tuple):
        return batch[:-1], {}
    keywords = {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    if encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(keywords):
        keywords |= _decoder_inputs(module, batch)
    return (), keywords


def _decoder_inputs(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder reads the targets, shifted right: by the model's own method, or inside its forward pass."""
    targets = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    if targets is None:
        return {}
    shift_right = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    return {"labels": targets} if shift_right is None else {"decoder_input_ids": shift_right(labels=targets)}


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and no global generator moves."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        torch.default_generator.manual_seed(0)
        if on_cuda:
            torch.cuda.manual_seed(0)
        yield


@contextmanager
def _plain_recurrence() -> Iterator[None]:
    """Recurrent layers from elementary operations: fused kernels have no batching rule, cuDNN's no evaluation mode."""
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [library.enabled for library in libraries]
    try:
        with changeable():
            for library in libraries:
                library.enabled = False
        yield
    finally:
        with changeable():
            for library, enabled in zip(libraries, before, strict=True):
                library.enabled = enabled
