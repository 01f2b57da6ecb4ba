"""The arguments of a model's `forward`, from a batch.

Of a mapping, everything but the targets is a keyword argument; of a tuple, everything but the last element is
positional, unless its fields have the names of arguments. The targets themselves are given to a model that requires
them, and, if asked for, to one that takes them: whether it makes a difference is seen by running it
(gradients/survey/readings.py).
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fisherfunc.gradients.data.batches import TARGET_KEYS, by_name, targets_of
from fisherfunc.records.axes import Batch

OF_TARGETS = (*TARGET_KEYS, "label", "target", "y")
"""What arguments of `forward` are called that the targets are for; the keys of a mapping are names of arguments."""
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def takes_targets(accepted: inspect.Signature) -> str:
    """How a forward method takes targets: "required", "optional" or "never"."""
    named = [p for p in accepted.parameters.values() if p.name in OF_TARGETS and p.kind in _NAMED]
    if any(p.default is p.empty for p in named):
        return "required"
    return "optional" if named or any(p.kind is p.VAR_KEYWORD for p in accepted.parameters.values()) else "never"


def time_first(module: nn.Module) -> tuple[str, ...]:
    """The modules inside that take time along axis 0, and samples along axis 1."""
    return tuple(name for name, part in module.named_modules() if getattr(part, "batch_first", True) is False)


def arguments(module: nn.Module, batch: Batch, accepted: inspect.Signature, *, give_targets: bool = False) -> Arguments:
    """Positional and keyword arguments of a call.

    Args:
        module: The model.
        batch: A mapping or a tuple.
        accepted: What its forward method takes.
        give_targets: Whether an argument that the targets fit gets them, also where it is not required.

    Raises:
        TypeError: If `forward` does not take what the batch holds.
    """
    named = by_name(batch)
    if named is None:
        _check_last_field(accepted, batch)
        found = _of_tuple(accepted, batch[:-1], batch[-1], give_targets)
    elif not isinstance(batch, Mapping):
        found = _of_fields(accepted, named, give_targets)
    else:
        found = (), _of_mapping(accepted, named, give_targets)
        found[1].update(_decoder_inputs(module, named, found[1]))
    _check_bound(module, accepted, found)
    return found


def _of_mapping(signature: inspect.Signature, batch: Mapping[str, Any], give_targets: bool) -> dict[str, Any]:
    return {key: v for key, v in batch.items() if key not in TARGET_KEYS or _wanted(signature, key, give_targets)}


def _wanted(signature: inspect.Signature, name: str, give_targets: bool) -> bool:
    parameters = signature.parameters
    if name in parameters and parameters[name].kind in _NAMED:
        return give_targets or parameters[name].default is inspect.Parameter.empty
    return give_targets and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _of_tuple(signature: inspect.Signature, inputs: tuple[Any, ...], targets: Any, give_targets: bool) -> Arguments:
    """The inputs by place, and the targets for what is called so and left."""
    left = [p.name for p in list(signature.parameters.values())[len(inputs) :] if p.name in OF_TARGETS]
    name = next((name for name in left if _wanted(signature, name, give_targets)), None)
    return inputs, {} if name is None else {name: targets}


def _check_last_field(signature: inspect.Signature, batch: Any) -> None:
    """Raise where a named tuple ends in an argument of `forward`, and by place in the targets."""
    last = getattr(batch, "_fields", (None,))[-1]
    if last in signature.parameters and last not in OF_TARGETS:
        raise TypeError(
            f"the named tuple has the fields {list(batch._fields)}, of which none is called 'labels' or 'targets', and "
            f"forward{signature} takes {last!r}: its last entry is the targets by place, and an input by name. Pass a "
            "dictionary for the one, a plain tuple (*inputs, targets) for the other"
        )


def _of_fields(signature: inspect.Signature, batch: Mapping[str, Any], give_targets: bool) -> Arguments:
    """Those of a named tuple: by its names where `forward` has them, by place where it has none of them."""
    inputs = [name for name in batch if name not in TARGET_KEYS]
    known = [name for name in inputs if name in signature.parameters]
    if len(known) == len(inputs):
        return (), _of_mapping(signature, batch, give_targets)
    if known:
        raise TypeError(
            f"the named tuple has the fields {list(batch)}, and forward{signature} takes some of them by name: by name "
            "or by place? Pass a dictionary for the one, a plain tuple (*inputs, targets) for the other"
        )
    return _of_tuple(signature, tuple(batch[name] for name in inputs), targets_of(batch), give_targets)


def _decoder_inputs(module: nn.Module, batch: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder reads the targets, shifted right: by the model's own method, or inside its forward pass."""
    encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    targets = targets_of(batch)
    if not encoder_decoder or targets is None or {"decoder_input_ids", "decoder_inputs_embeds"} & set(given):
        return {}
    shift_right = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    return {"labels": targets} if shift_right is None else {"decoder_input_ids": shift_right(labels=targets)}


def _check_bound(module: nn.Module, signature: inspect.Signature, found: Arguments) -> None:
    try:
        signature.bind(*found[0], **found[1])
    except TypeError as error:
        given = [*(f"input {place}" for place in range(len(found[0]))), *found[1]]
        raise TypeError(
            f"forward{signature} of {type(module).__name__} does not take this batch ({error}): it gives "
            f"{', '.join(given) or 'nothing'}; keys of a mapping are names of arguments, a tuple is (*inputs, targets)"
        ) from error
