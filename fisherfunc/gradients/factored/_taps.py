"""Where parameters enter a model's computation: the only module that intercepts what a model does.

While a model runs, every torch function that receives a parameter is seen. Where a rule knows its role (rules.py), the
output is kept in the autograd graph and what it was made from beside it: they, and the cotangent of the output, are the
parameter's gradient. A parameter that is used in any other way is reported, not guessed at. Modules that are called are
seen on request, and passed over where nothing of them is needed (skips.py).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fisherfunc.gradients.factored.arguments import exchanged, leaves_among
from fisherfunc.gradients.factored.calls import Call, made_by
from fisherfunc.gradients.factored.recording import Directions, Reached, Recording, Use
from fisherfunc.gradients.factored.rules import TRANSPOSES, Convolution, Map, Role, explained
from fisherfunc.gradients.factored.shortcuts import elementwise_origins, is_elementwise, is_view, shortened_path
from fisherfunc.gradients.factored.skips import ModuleCall, instead_of, returned_by


class Recorder(TorchFunctionMode):
    """Record the uses of some parameters while the context is active.

    Args:
        parameters: {name: leaf}, recognised by identity; the model must be given these very tensors. Where a use is
            explained, the function gets a constant in its place, so the graph leads to a leaf from other uses only.
        directions: What to do beside looking.
    """

    def __init__(self, parameters: Mapping[str, Tensor], directions: Directions | None = None) -> None:
        super().__init__()
        self.recording = Recording()
        self._directions = directions or Directions()
        self._kept: list[Tensor] = list(parameters.values())  # alive, so that an id stays theirs
        self._names = {id(tensor): (name, False) for name, tensor in parameters.items()}
        self._constants = {id(tensor): tensor.detach() for tensor in parameters.values()}
        self._nodes: dict[Any, tuple[str, int]] = {}
        self._counts: Counter[str] = Counter()
        self._call: Call = ("", 0, 0)
        self._num_calls = self._num_modules = 0
        self._skipped: set[str] = set()
        self._below_floor = self._directions.known is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; if it receives a watched parameter, record it."""
        result = self._run(func, args, kwargs or {})
        return self._on_the_way_out(result) if isinstance(result, Tensor) and result.requires_grad else result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = self._watched(args, kwargs)
        if not names or not torch.is_grad_enabled():  # no gradient comes this way
            return func(*args, **kwargs)
        if func in TRANSPOSES and args[0].ndim == 2:
            return self._alias(args[0], func)
        return self._recorded(func, args, kwargs, names)

    def _on_the_way_out(self, result: Tensor) -> Tensor:
        """Count the call; keep what it made, put what is known in its place, or end the pass: as the directions say."""
        self._call, self._num_calls = (*self._call[:2], self._call[2] + 1), self._num_calls + 1
        if self._below_floor and self._call == self._directions.floor:
            self._below_floor = False
            result = self._known_instead(result)
        if self._call in self._directions.values:
            self.recording.values[self._call] = (result, result._version)
        if self._directions.note and result.grad_fn is not None:
            made = made_by(self._call, self._num_calls, result)
            self.recording.made.setdefault((result.grad_fn, result.output_nr), made)
        if self._call == self._directions.keep:
            self.recording.cut = (result, result._version)
        if self._call == self._directions.stop:
            self.recording.end = result
            raise Reached
        return result

    def answer(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a module of the model; where it is to be skipped, go on as if that had been done."""
        if self._below_floor and name in self._directions.skipped:
            return self._skip(self._directions.skipped[name])
        if not self._directions.note:
            return run()
        began, before = self._num_modules, self._counts.copy()
        self._num_modules += 1
        result = run()
        call = ModuleCall(
            name=name,
            began=began,
            others=self._num_modules - began - 1,
            number=self._num_calls,
            call=self._call,
            uses=dict(self._counts - before),
            returned=returned_by(result),
        )
        self.recording.modules.append(call)
        return result

    def _skip(self, module: ModuleCall) -> Any:
        if module.name in self._skipped:  # a loop that ends by what it returns would not end
            raise LookupError(f"module {module.name!r} was called once, and is called again")
        assert module.returned is not None and self._directions.known is not None
        self._skipped.add(module.name)
        self._counts.update(module.uses)
        self._call = module.call
        return instead_of(module.returned, self._directions.known)

    def _known_instead(self, result: Tensor) -> Tensor:
        """What is known of the floor, where no graph leads on; another shape is left: its values will not be right."""
        known = self._directions.known
        if known is None or known.shape != result.shape:
            return result
        return known.detach().requires_grad_().clone()  # no leaf: the model may write to it

    def _watched(self, args: Any, kwargs: Any) -> list[str]:
        """The parameters among the arguments, each as often as it is there."""
        names = self._names
        return [names[id(leaf)][0] for leaf in leaves_among((*args, *kwargs.values())) if id(leaf) in names]

    def _roles(self, func: Any, args: Any, kwargs: Any) -> list[tuple[Tensor, Role]]:
        """What a rule knows of the watched parameters among the arguments."""
        return [(tensor, role) for tensor, role in explained(func, args, kwargs) if id(tensor) in self._names]

    def _alias(self, original: Tensor, transpose: Any) -> Tensor:
        transposed = transpose(original)
        name, flipped = self._names[id(original)]
        self._kept.append(transposed)
        self._names[id(transposed)] = (name, not flipped)
        self._constants[id(transposed)] = transpose(self._constants[id(original)])
        return transposed

    def _recorded(self, func: Any, args: Any, kwargs: Any, names: list[str]) -> Any:
        """Run `func` and record what it did with the named parameters; returns what the model is to go on with."""
        roles = self._roles(func, args, kwargs)
        for tensor, role in roles:
            if isinstance(role, Map) and role.multiplies:
                shortcut = self._on_the_way_in(tensor, role.source)
                if shortcut is not None:
                    args, kwargs = exchanged(args, kwargs, {id(role.source): shortcut})
                    roles = self._roles(func, args, kwargs)
        args, kwargs = exchanged(args, kwargs, {id(tensor): self._constants[id(tensor)] for tensor, _ in roles})
        unknown = _unknown(roles) if self._below_floor else None
        result = func(*args, **kwargs) if unknown is None else unknown
        if id(result) in self._names or not any(isinstance(leaf, Tensor) for leaf in leaves_among([result])):
            return result
        known: Counter[str] = Counter()
        if roles and _is_recordable(result):
            if self._directions.width > 1 and result.ndim > 1 and result.shape[0] == 1:
                result, roles = self._widen(result), [(tensor, self._widened(role)) for tensor, role in roles]
            for tensor, role in roles:
                known[self._put(tensor, role, result)] += 1
        for name in Counter(names) - known:  # also where one of two roles in one call is explained, as in W @ W
            self.recording.unknown[name] = getattr(func, "__name__", str(func))
        written_to = bool(self._directions.protected & set(names)) or (known and result.is_leaf)  # no leaf can be
        return result.clone() if written_to else result

    def _on_the_way_in(self, tensor: Tensor, source: Tensor) -> Tensor | None:
        """End the pass, or find a shortcut to what a linear map is about to receive, where the directions say so."""
        name = self._names[id(tensor)][0]
        key = (name, self._counts[name])
        if key == self._directions.last:
            self.recording.end = source
            raise Reached
        directions = self._directions
        if self._below_floor or not (directions.discover or key in directions.shortcuts):
            return None
        origins = elementwise_origins(source, self._nodes) or frozenset()
        outputs = [use.output for use in self.recording.uses if (use.name, use.number) in origins]
        if directions.discover:
            straight = bool(outputs) and not is_view(source, outputs) and is_elementwise(source, outputs)
        else:
            same = origins == directions.shortcuts[key]
            straight = same and (not directions.verify or is_elementwise(source, outputs))
        found = shortened_path(source, outputs) if straight else None
        if found is None:
            self.recording.crooked.add(key)
        else:
            self.recording.shortcuts[key] = origins
        return found

    def _widen(self, shared: Tensor) -> Tensor:
        return shared.expand(self._directions.width, *shared.shape[1:])

    def _widened(self, role: Role) -> Role:
        return replace(role, source=self._widen(role.source)) if isinstance(role, Map | Convolution) else role

    def _put(self, tensor: Tensor, role: Role, result: Tensor) -> str:
        name, flipped = self._names[id(tensor)]
        if not result.requires_grad:
            result.requires_grad_()
        if flipped and isinstance(role, Map):
            role = Map(source=role.source, axis=1 - role.axis)
        elif flipped:
            return ""  # nothing but linear maps is explained of a transposed weight
        number = self._counts[name]
        self._counts[name] += 1
        self._call = (name, number, 0)
        if self._below_floor:
            return name
        use = Use(name=name, size=tensor.numel(), number=number, output=result, version=result._version, role=role)
        self.recording.uses.append(use)
        self._nodes[torch.autograd.graph.get_gradient_edge(result).node] = (name, number)
        return name


def _unknown(roles: list[tuple[Tensor, Role]]) -> Tensor | None:
    """NaN in the shape of the output of a linear map of vectors, if that is what the roles say."""
    for tensor, role in roles:
        if isinstance(role, Map) and role.multiplies:
            return role.source.new_full((*role.source.shape[:-1], tensor.shape[role.axis]), nan)
    return None


def _is_recordable(result: Any) -> bool:
    """Whether rules hold for an output: they are about real numbers, outside any transform."""
    real = isinstance(result, Tensor) and result.is_floating_point()
    return real and not torch._C._functorch.is_functorch_wrapped_tensor(result)
