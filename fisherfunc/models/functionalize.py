"""A module as a pure function of its parameters, without touching the module.

Each call runs a copy of its own of the module's structure (isolation.py), in evaluation mode: a dropout mask or a batch
statistic would make a token's gradient depend on chance or on its neighbours. What a model draws at random all the
same, it draws alike in each call, from generators of its own. Forward hooks run, for they may be part of the function;
backward hooks do not, for they cannot be.
"""

import glob
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherfunc.gradients.autodiff.model_function import (
    Calls,
    ModelFunction,
    has_gradient,
    of_own_class,
    ordinary,
    packs_integers,
    same_memory,
)
from fisherfunc.gradients.autodiff.module_calls import Again, is_answered, watch_parts
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.linalg.mapped import check_not_transformed
from fisherfunc.models.arguments import arguments, takes_targets, time_first
from fisherfunc.models.calls.batch_of_one import ContiguousCotangents
from fisherfunc.models.calls.isolation import Blueprint, Holdings, evaluation_copy, fresh_copy, held_tensors, isolated
from fisherfunc.models.calls.recomputation import kept_activations
from fisherfunc.models.calls.uncached import uncached
from fisherfunc.models.calls.writes import Guard
from fisherfunc.records.axes import Batch
from fisherfunc.records.containers import flattened, mapped
from fisherfunc.runtime.draws import ONE_AT_A_TIME, same_draws
from fisherfunc.runtime.precision import changeable

Selection = str | Callable[[str], bool] | Iterable[str] | Iterable[Tensor] | nn.Module
_SELECTIONS = "expected 'trainable', 'all', names or glob patterns, parameters or a part of the model, or a predicate"


@torch.inference_mode(mode=False)
def functionalize(model: nn.Module, *, parameters: Selection = "trainable") -> ModelFunction:
    """A module as `apply(params, batch) → output`, in evaluation mode.

    A mapping is passed as keyword arguments, of a tuple all but the last element. Targets are passed where `forward`
    requires them; where it takes them, the passes find out whether that makes a difference (arguments.py).
    Tensors are shared with the module: training it afterwards changes `params`. Hooks of its backward pass do not run:
    gradients are those of the losses.

    Args:
        model: Any module; its mode, flags, hooks, buffers and `.grad` stay as they are.
        parameters: What to differentiate by: "trainable" (`requires_grad`), "all", names or glob patterns, parameters
            or a part of the model, or a predicate of the name. A tied tensor is one parameter, under its first name.

    Raises:
        ValueError: If no parameter is left, a pattern matches none, or a parameter is not a materialised real float.
        TypeError: If the model is not a module, is one that torch.func cannot call, or cannot be copied.
        RuntimeError: If it is called inside a transform of torch.func.

    Example:
        >>> fn = functionalize(nn.Linear(2, 3))
        >>> fn.apply(fn.params, (torch.zeros(4, 2), torch.zeros(4, 3))).shape
        torch.Size([4, 3])
    """
    _check_kind(model)
    originals = dict(model.named_parameters())
    for name, parameter in originals.items():
        _check_materialised(name, parameter)
    with same_draws(next((p.device for p in originals.values()), torch.device("cpu"))):
        private = _private_copy(model)  # its own train(False) may make layers
    everything = {name: p for name, p in private.named_parameters() if p.numel()}
    names = _selected(originals, parameters)
    for name in names:
        _check_differentiable(name, everything[name])
    blueprint = Blueprint(private)
    guard = Guard({name for name, _ in private.named_parameters()}, held_tensors(model), Holdings(model).kept)
    call = _calls(blueprint, guard)
    with_targets = {"required": call, "optional": _calls(blueprint, guard, give_targets=True), "never": None}
    return ModelFunction(
        params={name: ordinary(everything[name]) for name in names},
        frozen={name: same_memory(p) for name, p in everything.items() if name not in names},
        buffers={name: ordinary(b) for name, b in private.named_buffers()},
        call=call,
        name=type(model).__name__,
        given_targets=with_targets[takes_targets(inspect.signature(private.forward))],
        time_first=time_first(private),
    )


def _check_kind(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model expected a torch.nn.Module, got {type(model).__name__}")
    check_not_transformed("functionalize", instead="call it before, and what it returns inside")
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and any(p.requires_grad for p in part.parameters()):
            raise TypeError(
                f"{type(part).__name__}{f' at {name!r}' if name else ''} is TorchScript, whose parameters cannot be "
                "replaced for a call; pass the Python module, or set requires_grad_(False) on each of them"
            )
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
    elif isinstance(selection, nn.Module):
        chosen = _matching(names, [_name_of(p, parameters) for p in selection.parameters()])
    elif callable(selection):
        chosen = [name for name in names if selection(name)]
    else:
        if not isinstance(selection, Iterable):
            raise TypeError(f"parameters {_SELECTIONS}, got {type(selection).__name__}")
        wanted = [selection] if isinstance(selection, str | Tensor) else list(selection)
        chosen = _matching(names, [_name_of(value, parameters) for value in wanted])
    if not chosen:
        raise ValueError(
            f"no parameter left of {len(names)} with parameters={selection!r}: requires_grad is set on "
            f"{sum(p.requires_grad for p in parameters.values())} of them; parameters='all' takes all"
        )
    return chosen


def _name_of(value: Any, parameters: Mapping[str, nn.Parameter]) -> str:
    """What a parameter is called: of a tensor, or of a pair (name, tensor), as a module gives them."""
    if isinstance(value, str):
        return value
    tensor = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    name = next((name for name, parameter in parameters.items() if parameter is tensor), None)
    if name is None:
        raise TypeError(
            f"parameters {_SELECTIONS}, got {type(value).__name__}"
            + (f" of shape {tuple(tensor.shape)} that is none of the model's" if isinstance(tensor, Tensor) else "")
        )
    return glob.escape(name)


def _matching(names: list[str], patterns: list[str]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:  # a name may look like a pattern: it is meant as it is written
        found = {pattern} & set(names) or {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"parameters={pattern!r} matches none of the {len(names)} parameters, such as {names[:3]}; "
                "expected 'trainable', 'all', names or glob patterns (a tied tensor goes by its first name)"
            )
        chosen |= found
    return [name for name in names if name in chosen]


def _check_materialised(name: str, parameter: Tensor) -> None:
    if nn.parameter.is_lazy(parameter) or parameter.is_meta:
        raise ValueError(
            f"parameter {name!r} holds no values yet ({type(parameter).__name__} on {parameter.device}); run lazy "
            "modules once, load weights from the meta device"
        )


def _check_differentiable(name: str, parameter: Tensor) -> None:
    if not has_gradient(parameter) or packs_integers(parameter):
        raise ValueError(
            f"parameter {name!r} is {parameter.dtype} of shape {tuple(parameter.shape)}, in a "
            f"{type(parameter).__name__}, expected real floats: quantised or integer weights have no gradient; leave "
            "it out by parameters= ('trainable' takes an adapter's alone), or dequantise the model"
        )


def _calls(blueprint: Blueprint, guard: Guard, *, give_targets: bool = False) -> Calls:
    """The calls of passes, and ordinary ones to hold them against."""
    private = blueprint.module
    accepted = inspect.signature(private.forward)
    fixed = {"use_cache": False} if "use_cache" in accepted.parameters else {}
    recurrent = any(isinstance(module, nn.RNNBase) for module in private.modules())
    shapes_seen: set[Any] = set()
    first, needs_graph = [True], list[bool]()
    recordable = {name for name, p in private.named_parameters() if has_gradient(p) or p.is_complex()}

    def run(module: nn.Module, batch: Batch, device: torch.device) -> Any:
        positional, keywords = arguments(module, isolated(batch), accepted, give_targets=give_targets)
        with same_draws(device), uncached(), _plain_recurrence() if recurrent else nullcontext():
            return module(*positional, **{**fixed, **keywords})

    def passes(tensors: dict[str, Tensor], batch: Batch) -> Any:
        device = next(iter(tensors.values())).device

        def built(given: dict[str, Tensor]) -> Any:
            module = blueprint.build(
                {n: t.clone() if n in blueprint.buffers else _of_this_call(t) for n, t in given.items()}
            )
            if recorded:
                watch_parts(module)
            sound = ContiguousCotangents() if guard.normalises else nullcontext()
            with ONE_AT_A_TIME, sdpa_kernel(SDPBackend.MATH), kept_activations(), sound:
                return run(module, batch, device)

        def in_graph() -> Any:
            with torch.enable_grad():
                leaves = {n: nn.Parameter(t.detach()) if n in recordable else t for n, t in tensors.items()}
                return guard.watched(built, leaves)

        recorded, shapes = is_answered(), _shapes(batch)
        if torch.is_grad_enabled():
            while recorded or shapes in shapes_seen:
                try:
                    return guard.unwatched(built, tensors)
                except Again:
                    if recorded:
                        raise
            output = guard.watched(built, tensors)
            shapes_seen.add(shapes)
            return output
        # A look at the values of each sequence, whatever its shape.
        if first:
            # What it keeps outside of the module has a graph then, and the look at what gradients reach finds it.
            first.clear()
            with_graph, without = in_graph(), _or_none(lambda: guard.watched(built, tensors))
            if not _alike(mapped(_detached, with_graph), without):
                needs_graph.append(True)
        return mapped(_detached, in_graph()) if needs_graph else guard.watched(built, tensors)

    def ordinary_call(
        tensors: dict[str, Tensor], wanted: Collection[str]
    ) -> tuple[dict[str, Tensor], Callable[[Batch], Any]]:
        device = next(iter(tensors.values())).device
        parameters = {
            name: _parameter(tensors.get(name, own), requires_grad=name in wanted)
            for name, own in private.named_parameters()
        }

        def called(batch: Batch) -> Any:
            return guard.apart(lambda: run(fresh_copy(private, parameters, tensors), batch, device), parameters)

        return {name: p for name, p in parameters.items() if name in wanted}, called

    return Calls(passes, ordinary_call)


def _of_this_call(tensor: Tensor) -> Tensor:
    """What a call may set attributes of: packed weights are theirs of it alone."""
    return same_memory(tensor) if of_own_class(tensor) else tensor


def _parameter(tensor: Tensor, *, requires_grad: bool) -> nn.Parameter:
    """In the same memory, with a version counter of its own: it may be given other memory, and is written to then."""
    made = same_memory(tensor)
    return made if isinstance(made, nn.Parameter) else nn.Parameter(made.data, requires_grad=requires_grad)


def _or_none(run: Callable[[], Any]) -> Any:
    """What a call returns; None where it fails, as one without a graph does where the model takes gradients."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:
        return None


def _alike(one: Any, other: Any) -> bool:
    """Whether two outputs hold the same values, but for rounding."""
    pairs = [[leaf for _, leaf in flattened(output) if isinstance(leaf, Tensor)] for output in (one, other)]
    return [t.shape for t in pairs[0]] == [t.shape for t in pairs[1]] and all(map(_close, *pairs))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.layout != torch.strided or not one.dtype.is_floating_point or not one.numel():
        return one.dtype == other.dtype
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    size = float(one.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _shapes(batch: Batch) -> Any:
    return tuple((path, leaf.shape, leaf.dtype) for path, leaf in flattened(batch) if isinstance(leaf, Tensor))


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
