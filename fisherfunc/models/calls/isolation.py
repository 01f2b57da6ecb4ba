"""A user's module, isolated: every call starts from the module exactly as it was given.

A `Blueprint` is a copy of a module's structure that is never run. Each call gets a module of its own made from it, with
the tensors of that call as its parameters: what it keeps in attributes, buffers or containers goes with it, and a
backward pass that runs its modules again, however late, finds the same parameters. Copied are the objects that can
change; parameters are not (writes.py).
"""

import copy
import enum
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisherfunc.gradients.autodiff.model_function import of_own_class, ordinary, same_memory
from fisherfunc.gradients.autodiff.module_calls import HOOK
from fisherfunc.models.calls.writes import Reads, address_of, writes_refused
from fisherfunc.records.containers import mapped

ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, type),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.memory_format),
)
"""What has nothing in it that a call could change."""
MANY = 64
"""Entries of a table that is copied as one."""
REGISTRIES = ("_parameters", "_buffers", "_modules")
MAPPINGS = (dict, OrderedDict, defaultdict)


class Blueprint:
    """What modules are made from.

    Args:
        module: Never run, and not to be changed from here on.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.buffers = dict(module.named_buffers())
        self.tensors = dict(module.named_parameters()) | self.buffers
        self._parts = [_Part(part) for part in module.modules()]
        self._loose = _copied_loose(module)
        self._generators = [(one, one.get_state()) for one in _loose(module) if isinstance(one, torch.Generator)]
        self._tables = list(_tables([vars(part) for part in module.modules()]))

    def build(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Make a module that holds these tensors in place of its own, and copies of all else that can change.

        Cost: some microseconds a part of the module, and copies of the tensors that are neither parameter nor buffer.

        Args:
            tensors: By the names of parameters and buffers; of those that are not given it has its own.
        """
        memo: dict[int, Any] = {
            id(own): tensors[name] if name in tensors else own.detach() for name, own in self.tensors.items()
        }
        memo |= {id(tensor): copied(tensor) for tensor, copied in self._loose}
        memo |= {id(one): torch.Generator(one.device).set_state(state) for one, state in self._generators}
        memo |= {id(table): table.copy() for table in self._tables}
        plain = [part for part in self._parts if not part.copies_itself]
        for part in plain:
            memo[id(part.module)] = part.kind.__new__(part.kind)
        for part in plain:
            object.__setattr__(memo[id(part.module)], "__dict__", part.attributes(memo))
        return copy.deepcopy(self.module, memo)  # but for parts that copy themselves, what is made already


class _Part:
    """One module of a blueprint, its attributes sorted by what a copy of it needs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.copies_itself = "_orig_mod" not in module._modules and _copies_itself(self.kind)
        own = vars(module)
        self._registries = {key: own[key] for key in REGISTRIES}
        others = {key: value for key, value in own.items() if key not in REGISTRIES}
        self._compiled = "_orig_mod" in module._modules
        self._fixed = {key: value for key, value in others.items() if self._compiled or _is_fixed(value)}
        self._empty = {key: value for key, value in others.items() if _is_empty(value)}
        self._changing = {k: v for k, v in others.items() if k not in self._fixed and k not in self._empty}

    def attributes(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Make those of a copy, given what stands for the tensors and modules of the blueprint."""
        made = dict(self._fixed)
        for key, value in self._empty.items():  # modules may hold the same one
            made[key] = memo.setdefault(id(value), type(value)())
        for key, value in self._changing.items():
            made[key] = copy.deepcopy(value, memo)
        for key, registry in self._registries.items():
            made[key] = type(registry)((name, copy.deepcopy(entry, memo)) for name, entry in registry.items())
        if self._compiled:  # it calls the module that was compiled, as no transform of ours goes through it
            made[HOOK] = made["_modules"]["_orig_mod"].__call__
        return made


def _copies_itself(kind: type, base: type = nn.Module) -> bool:
    """Whether a class says itself how it is copied, or keeps attributes where `vars` does not show them."""
    own = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
    return any(getattr(kind, name, None) is not getattr(base, name, None) for name in own) or any(
        vars(parent).get("__slots__") for parent in kind.__mro__
    )


def _is_fixed(value: Any) -> bool:
    if type(value) in (tuple, frozenset):
        return all(map(_is_fixed, value))
    return isinstance(value, ATOMS)


def _tables(root: Any) -> Iterator[dict | list | set]:
    """The dictionaries, lists and sets of nothing that could change, such as vocabularies, wherever they are held.

    A copy of one is all of it: to look at each entry again at every call takes a hundred times as long.
    """
    return (node for node, inside in _containers(root) if _is_table(node, inside) and len(node) >= MANY)


def _is_table(node: Any, inside: list[Any]) -> bool:
    return type(node) in (dict, list, set) and (set(map(type, inside)) <= set(ATOMS) or all(map(_is_fixed, inside)))


def _containers(root: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Whatever holds others, wherever it is held, and what is in it; not modules, nor what is in tables."""
    seen: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, (*ATOMS, Tensor, nn.Module)):
            continue
        seen[id(node)] = node
        inside: list[Any] = []
        if type(node) in MAPPINGS:
            inside = [*node.keys(), *node.values()]
        elif type(node) in (list, set, tuple, deque):
            inside = list(node)
        elif not _copies_itself(type(node), object):
            inside = [getattr(node, "__dict__", None)]
        yield node, inside
        if not _is_table(node, inside):
            waiting += inside


class Holdings:
    """The containers of the user's module, put back where a call reaches past its copy and writes to them.

    A hook or a lambda that has the module in its closure, and keeps activations in a dictionary of it, is not copied:
    the copy of the module has it too. What is written to is looked for in the first call that ends.

    Args:
        module: The user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._held = [vars(part) for part in module.modules()]
        self._written: list[Any] | None = None

    def kept(self, run: Callable[[], Any]) -> Any:
        """Run something, and put back what it wrote to."""
        looked_at = self._written
        if looked_at is None:
            kinds = (*MAPPINGS, list, set, deque)
            looked_at = [node for node, _ in _containers(self._held) if type(node) in kinds and node is not self._held]
        before = [(node, copy.copy(node)) for node in looked_at]
        try:
            output = run()
            if self._written is None:
                self._written = [node for node, was in before if _differ(node, was)]
            return output
        finally:
            for node, was in before:
                if _differ(node, was):
                    node.clear()
                    (node.update if isinstance(node, dict | set) else node.extend)(was)


def _differ(node: Any, was: Any) -> bool:
    """Whether two containers hold other objects, or the same in another order."""
    if isinstance(node, set):
        return {*map(id, node)} != {*map(id, was)}
    inside, before = ([*one, *one.values()] if isinstance(one, dict) else one for one in (node, was))
    return len(inside) != len(before) or any(one is not other for one, other in zip(inside, before, strict=True))


def _is_empty(value: Any) -> bool:
    return type(value) in (dict, list, set, OrderedDict) and not value


def _loose_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors in attributes, containers and objects that are neither parameters nor buffers, in a graph or not."""
    registered = {id(t) for t in (*module.parameters(), *module.buffers())}
    return [leaf for leaf in _loose(module) if isinstance(leaf, Tensor) and id(leaf) not in registered]


def _copied_loose(module: nn.Module) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Loose tensors, each with how to copy it: those in the memory of packed weights stay there, where none may write.

    A layer may hold its packed weights in an object beside the parameter, and set either to the other at each call.
    """
    packed = {address_of(p) for p in module.parameters() if of_own_class(p)} - {0}
    loose = _loose_tensors(module)
    return [(t, ordinary if packed and address_of(t) in packed else Tensor.clone) for t in loose]


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All that a module holds beside its parameters, by name where it has one."""
    loose = {f"tensor {number} in its attributes": tensor for number, tensor in enumerate(_loose_tensors(module))}
    return dict(module.named_buffers()) | loose


def _loose(module: nn.Module) -> list[Any]:
    """What can change in attributes, containers and objects, each once; not what is registered."""
    found: dict[int, Any] = {}
    attributes = ((key, value) for part in module.modules() for key, value in vars(part).items())
    waiting = [v for key, v in attributes if not (key in REGISTRIES or isinstance(v, ATOMS) or _is_empty(v))]
    while waiting:
        for leaf in pytree.tree_leaves(waiting.pop()):
            if not isinstance(leaf, (*ATOMS, nn.Module)) and id(leaf) not in found:
                found[id(leaf)] = leaf
                if not isinstance(leaf, Tensor):
                    waiting.append(getattr(leaf, "__dict__", {}))
    return list(found.values())


def evaluation_copy(model: nn.Module) -> nn.Module:
    """Copy the structure of a module, which goes into evaluation mode; its tensors are seen through aliases.

    Where the module's own `train(False)` writes to parameters or buffers (low-rank updates are folded into weights so),
    or keeps a tensor that it made of parameters (no gradient would reach these), the flags `training` are set instead,
    and what it computes in training is computed.

    Raises:
        TypeError: If it cannot be copied.
        ValueError: If `train(False)` fails.
    """
    private = structure_copy(model)
    before, held = _identities(private), [*private.buffers(), *_loose_tensors(private)]
    with (
        writes_refused(dict(private.named_parameters()) | dict(private.named_buffers())) as guard,
        Reads(private.parameters()) as reads,
    ):
        try:
            private.eval()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot be put into evaluation mode: its own train(False) raises "
                f"{type(error).__name__}: {error}; gradients per token are those of evaluation mode"
            ) from error
    kept = {id(t) for t in (*private.buffers(), *_loose_tensors(private))} - {id(t) for t in held}
    if guard.found or _identities(private) != before or (kept and reads.any):
        private = structure_copy(model)
        for part in private.modules():
            part.training = False
    return private


def fresh_copy(module: nn.Module, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy a module by Python's own means, with these as its parameters, and copies of these tensors as buffers.

    What a blueprint makes is held against calls of this: it shares with it what tensors and what is empty.

    Args:
        module: The module.
        parameters: By name, all of them.
        tensors: By the names of buffers.
    """
    memo: dict[int, Any] = {id(tensor): copied(tensor) for tensor, copied in _copied_loose(module)}
    empty = [value for part in module.modules() for value in vars(part).values() if _is_empty(value)]
    memo |= {id(value): type(value)() for value in empty}  # most of what a module holds, and slow to copy one by one
    for name, parameter in module.named_parameters():
        memo[id(parameter)] = parameters[name]
    for name, buffer in module.named_buffers():
        memo[id(buffer)] = tensors.get(name, buffer).clone()
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        if "_orig_mod" in part._modules:  # compiled
            setattr(part, HOOK, part.get_submodule("_orig_mod").__call__)
    return copied


def structure_copy(model: nn.Module) -> nn.Module:
    """Copy the structure of a module; parameters and buffers are seen through aliases, other tensors are copied.

    Raises:
        TypeError: If it cannot be copied, or its copy lacks something.
    """
    memo: dict[int, Any] = {id(t): _alias(t) for t in (*model.parameters(), *model.buffers())}
    memo |= {id(tensor): copied(tensor) for tensor, copied in _copied_loose(model)}
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise TypeError(
            f"cannot copy the structure of {type(model).__name__} ({error}); remove what cannot be deep-copied, "
            "such as open files, locks or generators, from the module and its hooks"
        ) from error
    for name, part in model.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, list | dict | set | deque):
                raise TypeError(
                    f"cannot copy the structure of {type(model).__name__}: {key!r} of {name or 'the module'!r} is a "
                    f"method of one {type(value.__self__).__name__}, and would change that; keep the object there"
                )
    own = {id(part) for part in model.modules()}
    for name, part in copied.named_modules():
        if id(part) in own:
            raise TypeError(
                f"cannot copy the structure of {type(model).__name__}: its deep copy holds {name or 'the module'!r} "
                f"({type(part).__name__}) itself; look for a __deepcopy__ that shares it, and leave that out"
            )
    for (name, part), (_, its_copy) in zip(model.named_modules(), copied.named_modules(), strict=False):
        whole = "_orig_mod" in part._modules or isinstance(part, torch.jit.ScriptModule)  # methods come when asked for
        copies_itself = not whole and _copies_itself(type(part))
        lost = _differing(part, its_copy) if copies_itself else []
        if lost:
            raise TypeError(
                f"cannot copy the structure of {type(model).__name__}: the deep copy of {name or 'the module'!r} "
                f"({type(part).__name__}) has another {lost[0]!r}; look for a __getstate__, __reduce__ or __deepcopy__ "
                "that leaves it out, and have it keep what forward may read"
            )
    return copied


def _differing(part: nn.Module, its_copy: nn.Module) -> list[str]:
    """The attributes that a copy lacks, or has with another plain value or number of entries."""
    there, found = vars(part), vars(its_copy)

    def differs(key: str, value: Any) -> bool:
        if key not in found:
            return key != HOOK
        if type(value) in (bool, int, float, str):
            return found[key] is not value and found[key] != value and value == value
        return isinstance(value, list | tuple | dict | set) and len(found[key]) != len(value)

    return [key for key, value in there.items() if differs(key, value)]


def _alias(tensor: Tensor) -> Tensor:
    """The same memory under another object: `.data = …` there changes nothing here."""
    if of_own_class(tensor):
        return same_memory(tensor, requires_grad=tensor.requires_grad)
    if type(tensor) is nn.Parameter:
        return nn.Parameter(ordinary(tensor), requires_grad=tensor.requires_grad)
    return ordinary(tensor) if type(tensor) is Tensor and not tensor.requires_grad else tensor


def _identities(module: nn.Module) -> dict[str, Any]:
    return {name: (t.data_ptr(), t.shape) for name, t in module.named_parameters()}


def isolated(batch: Any) -> Any:
    """Copy all of a batch that a model could write to.

    Raises:
        TypeError: If something in it cannot be copied.
    """
    return mapped(_copied, batch)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if _is_fixed(leaf):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise TypeError(
            f"the batch holds a {type(leaf).__name__} that cannot be copied ({error}), so the model could write to it; "
            "take it out, or put tensors in its place"
        ) from error
