"""Writes to a user's tensors, seen before they happen.

A version counter tells after the harm, and nothing of what is written through `.data`. So the first forward pass over
inputs of a shape, and every one without gradients, runs under a mode that sees each operation before it is done: where
one would write to a parameter, or NumPy is given its memory, the call ends, and starts again with a copy of that
parameter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from fisherfunc.gradients.autodiff.model_function import has_gradient, of_own_class
from fisherfunc.gradients.autodiff.module_calls import Again

AS_ARRAYS = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
"""What gives a tensor's memory to others than torch, whose writes are no operations: taken for a write."""
_AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
IN_PLACE = {"__setitem__", *(f"__i{operation}__" for operation in _AUGMENTED)}
"""What writes to a tensor without the underscore at the end that torch gives such names."""


class WriteFound(BaseException):
    """Ends a call before it writes to a protected tensor; no error, so no handler of the model may take it."""


class WritesRefused(TorchDispatchMode):
    """See every operation before it is done; end the call where one would write to a protected tensor.

    Args:
        protected: By name.
    """

    def __init__(self, protected: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.normalises = False
        self._names = {address: name for name, tensor in protected.items() if (address := address_of(tensor))}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, unless it writes to what is protected."""
        kwargs = kwargs or {}
        is_mutable, normalises = _nature(func)
        if is_mutable:
            self.end([address_of(tensor) for tensor in _written(func, args, kwargs)])
        self.normalises = self.normalises or normalises
        return func(*args, **kwargs)

    def end(self, addresses: Collection[int]) -> None:
        """End the call where one of these is protected."""
        found = {self._names[address] for address in addresses if address in self._names}
        if found:
            self.found |= found
            raise WriteFound


class _FunctionsRefused(TorchFunctionMode):
    """See functions that write to a tensor, or give its memory to NumPy or another library, which may write to it.

    It sees what a model calls, not what that does inside: some microseconds a call, where `WritesRefused` takes as long
    for each operation.
    """

    def __init__(self, guard: WritesRefused) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, unless it would write to what is protected."""
        kwargs = kwargs or {}
        if _writes_to_first(func):
            written = args[0] if args else next(iter(kwargs.values()), None)
            self._guard.end([address_of(leaf) for leaf in pytree.tree_leaves(written) if isinstance(leaf, Tensor)])
        if "out" in kwargs:
            self._guard.end(
                [address_of(leaf) for leaf in pytree.tree_leaves(kwargs["out"]) if isinstance(leaf, Tensor)]
            )
        return func(*args, **kwargs)


@cache
def _writes_to_first(func: Any) -> bool:
    """Whether a function of torch may write to its first argument, by its name."""
    name = getattr(func, "__name__", "")
    return func in AS_ARRAYS or name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


class Reads(TorchDispatchMode):
    """See whether an operation takes one of some tensors.

    Args:
        tensors: What to look for.

    Attributes:
        any: Whether one did.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.any = False
        self._addresses = {address_of(tensor) for tensor in tensors} - {0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and look at what it takes."""
        given = (leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor))
        self.any = self.any or any(address_of(tensor) in self._addresses for tensor in given)
        return func(*args, **(kwargs or {}))


@contextmanager
def writes_refused(protected: Mapping[str, Tensor]) -> Iterator[WritesRefused]:
    """Inside, the first write to a protected tensor ends the call; its name is found afterwards."""
    guard = WritesRefused(protected)
    try:
        with guard, _FunctionsRefused(guard):
            yield guard
    except WriteFound:
        pass


@cache
def _nature(func: Any) -> tuple[bool, bool]:
    """Whether an operation writes to something, and whether it normalises by a batch; schemas take long to read."""
    return func._schema.is_mutable, "batch_norm" in func.overloadpacket.__name__


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def address_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 where it has none of its own (empty, sparse, under a transform)."""
    if is_traceable_wrapper_subclass(tensor):  # its memory is that of the tensors that it is made of
        inner: Any = tensor
        return address_of(getattr(tensor, inner.__tensor_flatten__()[0][0]))
    if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return 0
    return tensor.untyped_storage().data_ptr()


class Guard:
    """Have calls write to no parameter: what would is given a copy of it, from then on.

    Args:
        protected: The names of the tensors that are not to be written to.
        users: What the user's module holds beside them, by name; calls have copies of it.
        kept: Runs a call, and puts back what it wrote to containers of the user's module.

    Attributes:
        normalises: Whether a call that was watched had a batch or instance normalisation in it.
    """

    def __init__(
        self,
        protected: set[str],
        users: Mapping[str, Tensor] = MappingProxyType({}),
        kept: Callable[[Callable[[], Any]], Any] = lambda run: run(),
    ) -> None:
        self._protected, self._users, self._kept = protected, users, kept
        self._copied: set[str] = set()
        self.normalises = False

    def watched(self, run: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor]) -> Any:
        """Run what takes tensors by name; where it is about to write to a protected one, again with a copy of that.

        Raises:
            ValueError: If it gives a protected tensor other memory, or writes to the user's; the error names it.
        """
        while True:
            given = self.writable(tensors)
            output = None
            watched = {n: t for n, t in given.items() if n in self._protected - self._copied}
            with writes_refused({**self._users, **watched}) as guard:
                output = self._in_place(run, given)
            self.normalises = self.normalises or guard.normalises
            if not guard.found:
                return output
            if beyond := guard.found - watched.keys():
                raise ValueError(
                    f"the forward pass writes to {min(beyond)!r} of the module that was given, and not to that of the "
                    "copy which is run: a closure, or a method that was put in another's place, holds the module "
                    "itself; have it take the module as an argument"
                )
            self._copy(guard.found, given)

    def unwatched(self, run: Callable[[dict[str, Tensor]], Any], tensors: dict[str, Tensor]) -> Any:
        """Run it with a look at the functions that it calls alone, where such a call was watched before.

        Raises:
            Again: If it was about to write to a protected tensor; the next call is given a copy of that.
            ValueError: If it wrote to a protected tensor all the same, or gives it other memory; the error names it.
        """
        given = self.writable(tensors)
        watched = {name: t for name, t in given.items() if name in self._protected - self._copied}
        before = {name: t._version for name, t in watched.items()}
        guard = WritesRefused(watched)
        try:
            with _FunctionsRefused(guard):
                output = self._in_place(run, given)
        except WriteFound:
            self._copy(guard.found, given)
            raise Again from None
        for name, version in before.items():
            if given[name]._version != version:
                raise ValueError(
                    f"the forward pass wrote to parameter {name!r}, which no earlier pass over inputs of these shapes "
                    "did; write to a copy of it there"
                )
        return output

    def apart(self, run: Callable[[], Any], parameters: Mapping[str, nn.Parameter]) -> Any:
        """Run what starts afresh each time and has these parameters; those that it writes to get memory of their own.

        Args:
            run: Runs a module that has them.
            parameters: By name, in the memory of the protected tensors.
        """
        users = {name: p.data for name, p in parameters.items()}
        while True:
            for name in self._copied & users.keys():
                parameters[name].data = users[name].clone()
            output = None
            with writes_refused({n: p for n, p in users.items() if n in self._protected - self._copied}) as guard:
                output = self._kept(run)
            if not guard.found:
                return output
            self._copy(guard.found, parameters)

    def _copy(self, found: set[str], tensors: Mapping[str, Tensor]) -> None:
        """Have calls be given copies of these from now on."""
        for name in found:
            if of_own_class(tensors[name]):
                raise ValueError(
                    f"the forward pass writes into the quantised weights {name!r} of the module that was given; have "
                    "it write to a copy, as each call must start from the module as it was given"
                )
        self._copied |= found

    def _in_place(self, run: Callable[[dict[str, Tensor]], Any], given: dict[str, Tensor]) -> Any:
        """Run it, and see to it that the tensors keep their memory: `.data = …` is no operation that could be seen.

        Quantised weights may be packed anew: no gradient is missed, and what holds them is of this call alone.
        """
        mine = {name: t for name, t in given.items() if name in self._protected and has_gradient(t) and address_of(t)}
        with torch.no_grad():  # nothing that a recorder takes for a use
            before = {name: (t, t.detach(), address_of(t)) for name, t in mine.items()}
        try:
            return self._kept(lambda: run(given))
        finally:
            replaced = [name for name, (t, _, address) in before.items() if address_of(t) != address]
            for name in replaced:
                before[name][0].data = before[name][1]
            if replaced:
                raise ValueError(
                    f"the forward pass gives {replaced[0]!r} other memory (`.data = …`), which no gradient can follow; "
                    "write to it in place, or to a tensor of its own"
                )

    def writable(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, with copies of those that are written to."""
        return {name: t.clone() if name in self._copied else t for name, t in tensors.items()}
