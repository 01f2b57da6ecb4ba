"""Where parameters enter a model's computation: the only module that intercepts what a model does.

While a model runs, every torch function that receives a parameter is seen. Where a rule knows its role (rules.py), the
output is kept in the autograd graph and what it was made from beside it: they, and the cotangent of the output, are the
parameter's gradient. A parameter that is used in any other way is reported, not guessed at: also one whose output a
gradient with a graph of its own goes through before the pass has ended, for that gradient has the parameter in it.
Modules that are called are seen on request, and played back where that is asked for (segments.py).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fisherfunc.gradients.capture.arguments import exchanged, leaves_among
from fisherfunc.gradients.capture.calls import ModuleCall, OuterCall, Way, returned_by
from fisherfunc.gradients.capture.recording import Directions, Reached, Recording, Use, state_of
from fisherfunc.gradients.capture.rules import TRANSPOSES, Convolution, Map, Role, explained
from fisherfunc.gradients.capture.segments import edge_of

DIFFERENTIATES = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
"""What takes gradients; not all of it is seen in every version of torch, and what matters of it by hooks as well."""

_OF_LEAF: Any = Tensor.grad
INSIDE = "a gradient that is taken inside"


class Differentiation(TorchFunctionMode):
    """See whether a gradient is taken, and say so in a recording."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and see what it is."""
        self._recording.differentiates |= func in DIFFERENTIATES
        return func(*args, **(kwargs or {}))


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
        self._counts: Counter[str] = Counter()
        self._way: Way | None = self._directions.way
        self._num_modules = 0
        self._inside = False
        self._handles: list[RemovableHandle] = []

    def close(self) -> None:
        """Look for gradients no more: those to come are ours."""
        while self._handles:
            self._handles.pop().remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`; if it receives a watched parameter, record it."""
        result = self._run(func, args, kwargs or {})
        if self._directions.note and isinstance(result, Tensor) and result.requires_grad:
            self.recording.num_bytes += result.numel() * result.element_size()
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = self._watched(func, args, kwargs)
        if func in DIFFERENTIATES or (names and func == _OF_LEAF.__get__):
            self._asked_for_gradients(names)
        if not names or not torch.is_grad_enabled():  # no gradient comes this way
            return func(*args, **kwargs)
        if func in TRANSPOSES and args[0].ndim == 2:
            return self._alias(args[0], func)
        return self._recorded(func, args, kwargs, names)

    def answer(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a module of the model, or play back what it returned, as the directions say."""
        if self._directions.note:
            return self._noted(name, run)
        if self._way is None or self._inside:
            return run()
        number, calls = self._num_modules, self._way.outline.calls
        if number >= len(calls) or calls[number].call.name != name:
            self._go_astray()
        outer = calls[number]
        if outer.playable and outer.rank <= self._way.floor:
            self._num_modules += 1 + outer.inside
            return self._played(outer)
        self._num_modules += 1
        self._inside = not outer.opened
        try:
            result = run()
        finally:
            self._inside = False
        if self._num_modules != number + 1 + outer.inside:
            self._go_astray()
        if outer.playable:
            self._keep(outer, result)
        if outer.rank == self._way.end:
            raise Reached
        return result

    def _noted(self, name: str, run: Callable[[], Any]) -> Any:
        began, before = self._num_modules, self._counts.copy()
        self._num_modules += 1
        result = run()
        returned = returned_by(result)
        tensors = () if returned is None else (result,) if returned.alone else result
        call = ModuleCall(
            name=name,
            began=began,
            ended=len(self.recording.modules),
            others=self._num_modules - began - 1,
            uses=dict(self._counts - before),
            uses_until=len(self.recording.uses),
            bytes_until=self.recording.num_bytes,
            returned=returned,
            edges=tuple(None if t is None else edge_of(t) for t in tensors),
            sizes=tuple(0 if t is None else t.numel() * t.element_size() for t in tensors),
        )
        self.recording.modules.append(call)
        return result

    def _keep(self, outer: OuterCall, result: Any) -> None:
        expected = outer.call.returned
        if expected is None or not expected.is_like(returned_by(result)):
            self._go_astray()
        for index, tensor in enumerate((result,) if expected.alone else result):
            if tensor is not None:
                self.recording.returned[outer.rank, index] = (tensor, state_of(tensor))

    def _played(self, outer: OuterCall) -> Any:
        """Return what a call returned before, where no graph leads on; no leaf itself, as the model may write to it."""
        assert self._way is not None and outer.call.returned is not None
        keys = [(outer.rank, index) for index in range(len(outer.call.returned.shapes))]
        played = {key: self._way.played[key].detach().requires_grad_() for key in keys if key in self._way.played}
        self.recording.played |= played
        self._counts.update(outer.call.uses)
        self.recording.uses_below = len(self.recording.uses)
        with torch._C.DisableTorchFunction(), torch.enable_grad():  # nobody is to see these calls; it had a graph
            found = tuple(played[key].clone() if key in played else None for key in keys)
        return found[0] if outer.call.returned.alone else found

    def _go_astray(self) -> NoReturn:
        self.recording.astray = True
        raise Reached

    def _watched(self, func: Any, args: Any, kwargs: Any) -> list[str]:
        """The parameters among the arguments, each as often as it is there."""
        if func is Tensor.__deepcopy__:  # it is handed what was copied before it as well
            args, kwargs = args[:1], {}
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
            name = self._names[id(tensor)][0]
            if isinstance(role, Map) and role.multiplies and (name, self._counts[name]) == self._directions.last:
                self.recording.end = role.source
                raise Reached
        args, kwargs = exchanged(args, kwargs, {id(tensor): self._constants[id(tensor)] for tensor, _ in roles})
        result = func(*args, **kwargs)
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
        use = Use(name=name, size=tensor.numel(), number=number, output=result, version=result._version, role=role)
        self.recording.uses.append(use)
        node = torch.autograd.graph.get_gradient_edge(result).node
        self._handles.append(node.register_prehook(partial(self._passed_through, name)))
        return name

    def _asked_for_gradients(self, names: list[str]) -> None:
        """End the pass where the graph does not lead to what the model asks for, as it would without us."""
        recording = self.recording
        recording.differentiates = True
        recording.unknown |= dict.fromkeys(names, INSIDE)
        if names or recording.played:
            recording.interrupted = True
            raise Reached

    def _passed_through(self, name: str, _: Any) -> None:
        if torch.is_grad_enabled():  # the gradient has a graph of its own, which leads to a constant
            self.recording.unknown.setdefault(name, INSIDE)


def _is_recordable(result: Any) -> bool:
    """Whether rules hold for an output: they are about real numbers, without tangents and outside any transform."""
    real = isinstance(result, Tensor) and result.is_floating_point()
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(result) or forward_ad._current_level >= 0
    return real and not transformed
