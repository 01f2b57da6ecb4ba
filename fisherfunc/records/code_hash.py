"""What a function is: a hash of its code and of all that its code reads; the same in every process, whatever its name.

Of a function of the user's own count bytecode, constants and names, defaults, and what its global and free variables
hold, followed as far as they are read: of `config.loss.eps` the number, of `self.helper` that method and what it reads.
Functions and classes of torch, Python and installed packages are known by their names; functions of this package are
what was put into them. Tensors count by dtype, shape and values, other objects by their class and what `pickle` stores.
"""

import builtins
import dis
import functools
import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch

from fisherfunc.records.hashing import SHORT
from fisherfunc.records.packages import OURS, module_of, package_of, reached
from fisherfunc.records.tensor_files import bytes_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented))
_NAMED = torch.dtype | torch.device | torch.layout | torch.memory_format
_NAMED |= type(torch.ops.aten.add) | type(torch.ops.aten.add.Tensor)
_NOT_READ = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__parameters__"}
_NOT_READ |= {"__abstractmethods__", "_abc_impl", "__dataclass_fields__", "__dataclass_params__", "__orig_bases__"}
_NOT_READ |= {"__firstlineno__", "__static_attributes__"}
"""What a class has that its instances do not run."""


class UnidentifiedError(ValueError):
    """Something cannot be told from others of its kind: a generator, a lock, an open file."""


def code_hash(value: Any) -> str:
    """16 hexadecimal digits that are the same for the same code, with the version of Python whose bytecode was read.

    Args:
        value: Functions, objects, tensors and plain values in lists, tuples and dictionaries.

    Raises:
        UnidentifiedError: If something in it cannot be identified; it says what.

    Example:
        >>> def scaled(factor):
        ...     return lambda x: factor * x
        >>> code_hash(scaled(2)) == code_hash(scaled(2)), code_hash(scaled(2)) == code_hash(scaled(3))
        (True, False)
    """
    reader = _Reader()
    try:
        digest = (reader.digest(value) or b"").hex()[:SHORT]
    except RecursionError as error:
        raise UnidentifiedError(f"{type(value).__name__} holds objects within objects too deep to follow") from error
    return f"{digest} (Python {'.'.join(platform.python_version_tuple()[:2])})" if reader.has_read_code else digest


class _Reader:
    """Digests of values; None of a function of this package into which nothing was put."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], bytes | None] = {}
        self.path: list[tuple[int, int]] = []  # of those that are being read, as a value may hold itself
        self.alive: list[Any] = []  # else another value could get the id of one that is gone
        self.has_read_code = False

    def digest(self, value: Any) -> bytes | None:
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            return _hash(type(value).__name__.encode(), repr(value).encode())
        key = (id(value.__func__), id(value.__self__)) if isinstance(value, MethodType) else (id(value), 0)
        if key in self.path:
            return _hash(b"itself", str(len(self.path) - self.path.index(key)).encode())
        if key not in self.known:
            self.alive.append(value)
            self.path.append(key)
            self.known[key] = self._read(value)
            self.path.pop()
        return self.known[key]

    def all(self, kind: str, values: Iterable[Any]) -> bytes:
        return _hash(kind.encode(), *(self.digest(value) or b"" for value in values))

    def _read(self, value: Any) -> bytes | None:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, _NAMED):
            return _hash(repr(value).encode())
        if type(value) in (tuple, list):
            return self.all(type(value).__name__, value)
        if type(value) in (set, frozenset):
            return _hash(b"set", *sorted(self.digest(entry) or b"" for entry in value))
        if type(value) is dict:
            return self.all("dict", (part for pair in value.items() for part in pair))
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return self._method(value)
        if isinstance(value, ModuleType):
            return self._named("module", value.__name__, value.__name__)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, property | staticmethod | classmethod | functools.cached_property):
            parts = [getattr(value, name, None) for name in ("fget", "fset", "__func__", "func")]
            return self.all(type(value).__name__, parts)
        if isinstance(value, BuiltinFunctionType):
            owner: Any = value.__self__
            return self.all(f"in C {value.__name__}", [getattr(owner, "__name__", owner)])
        return self._object(value)

    def _tensor(self, tensor: torch.Tensor) -> bytes:
        try:
            content = bytes_of(tensor.detach())
        except (RuntimeError, NotImplementedError, TypeError) as error:  # sparse, quantised, fake
            raise UnidentifiedError(f"a tensor of layout {tensor.layout} on {tensor.device}: {error}") from error
        return _hash(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), content)

    def _named(self, kind: str, module: str, name: str) -> bytes:
        package = package_of(module)
        if package is None:
            raise UnidentifiedError(f"the {kind} {name!r} is used as a whole, and its code may be any")
        return _hash(kind.encode(), package.encode(), f"{module}.{name}".encode())

    def _code(self, code: CodeType, doc: str | None = None) -> bytes:
        self.has_read_code = True
        constants = [None if index == 0 and value == doc else value for index, value in enumerate(code.co_consts)]
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_names)
        return _hash(code.co_code, code.co_exceptiontable, repr(shape).encode(), self.all("constants", constants))

    def _function(self, function: FunctionType) -> bytes | None:
        module = module_of(function)
        package = package_of(module)
        within = _within(function, package)
        if within is not None:
            return self.digest(within)
        if package == OURS:
            given = [digest for value in _cells(function).values() if (digest := self.digest(value)) is not None]
            return _hash(b"ours", *given) if given else None
        code = function.__code__
        if package is not None:
            local = "<locals>" in code.co_qualname
            held = [_cells(function), function.__defaults__, function.__kwdefaults__] if local else []
            return _hash(self._named("function", module, code.co_qualname), self.all("held", held))
        held = [function.__defaults__, function.__kwdefaults__, *self._read_by(function)]
        return _hash(b"function", self._code(code, function.__doc__), self.all("held", held))

    def _method(self, method: MethodType) -> bytes:
        function, owner = method.__func__, method.__self__
        if not isinstance(function, FunctionType) or package_of(module_of(function)) is not None:
            return self.all("method", [function, owner])
        code = function.__code__
        own = code.co_varnames[0] if code.co_argcount else None
        chains = _chains(code, lambda name: name == own, _LOCAL)
        whole = own is None or "__class__" in code.co_freevars  # super()
        read = [owner] if whole else self._followed({own: owner}, chains)
        return self.all("method", [function, *read])

    def _read_by(self, function: FunctionType) -> Iterator[Any]:
        """What the variables hold that a function reads, but for its own."""
        code, cells = function.__code__, _cells(function)
        for name in _imports(code):
            if package_of(name) is None:
                raise UnidentifiedError(f"it imports {name!r} when it is called")
        yield from self._followed(cells, _chains(code, cells.__contains__, _FREE))
        variables = {**vars(builtins), **function.__globals__}
        yield from self._followed(variables, _chains(code, lambda name: True, _GLOBAL))

    def _followed(self, variables: Mapping[Any, Any], chains: Iterable[tuple[str, ...]]) -> list[Any]:
        return [_at_end(variables[root], attributes) for root, *attributes in chains if root in variables]

    def _class(self, cls: type) -> bytes:
        if package_of(cls.__module__) is not None and reached(cls):
            return self._named("class", cls.__module__, cls.__qualname__)
        content = {name: value for name, value in vars(cls).items() if name not in _NOT_READ}
        slots = {name: None for name, value in content.items() if isinstance(value, MemberDescriptorType)}
        return self.all("class", [cls.__bases__, sorted((content | slots).items(), key=lambda pair: pair[0])])

    def _object(self, value: Any) -> bytes:
        cls = type(value)
        try:
            stored = value.__reduce_ex__(2)
        except Exception as error:  # of the user's own: anything
            raise UnidentifiedError(f"a {cls.__qualname__}: {error}") from error
        if isinstance(stored, str):  # known by its name
            inner = getattr(value, "__wrapped__", None)  # functools.lru_cache
            return (
                self.all("wrapped", [inner])
                if inner
                else self._named("object", getattr(value, "__module__", cls.__module__), stored)
            )
        made, arguments, *rest = stored
        return self.all("object", [made, arguments, *(list(p) if isinstance(p, Iterator) else p for p in rest)])


def _within(function: FunctionType, package: str | None) -> Any:
    """What is behind a wrapper that changes nothing of it: type checks, torch.compile; None where there is none."""
    checks = (package or "").startswith(("jaxtyping", "beartype")) or "beartype" in function.__code__.co_filename
    inner = getattr(function, "__wrapped__", None) if checks else None
    return getattr(function, "_torchdynamo_orig_callable", None) if inner is None else inner


def _hash(*parts: bytes | memoryview) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def _cells(function: FunctionType) -> dict[Any, Any]:
    """{free variable: what it holds}; without those that hold nothing yet."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    found = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # empty
            continue
    return found


_LOCAL, _FREE, _GLOBAL = ("LOAD_FAST", "LOAD_DEREF"), ("LOAD_DEREF", "LOAD_CLASSDEREF"), ("LOAD_GLOBAL", "LOAD_NAME")


def _chains(code: CodeType, wanted: Callable[[str], bool], loads: tuple[str, ...]) -> list[tuple[str, ...]]:
    """(variable, attribute, attribute …) of all that code, and code within it, reads; in order, each once.

    Where a variable is also used otherwise than by its attributes, it is alone: as a whole.
    """
    found: dict[tuple[str, ...], None] = {}
    open_chain: tuple[str, ...] = ()
    for step in [*dis.get_instructions(code), None]:
        if step is not None and open_chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            open_chain = (*open_chain, str(step.argval))
            continue
        if open_chain:
            found[open_chain] = None
        open_chain = ()
        if step is not None and step.opname.startswith(loads):
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            found |= {(name,): None for name in names[:-1] if wanted(name)}  # of several at once, the last is on top
            open_chain = (names[-1],) if wanted(names[-1]) else ()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= dict.fromkeys(_chains(constant, wanted, loads))
    return list(found)


def _imports(code: CodeType) -> Iterator[str]:
    yield from (str(step.argval) for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _imports(constant)


def _at_end(value: Any, attributes: Iterable[str]) -> Any:
    """What a chain of attributes leads to; as far as no code of a property has to run."""
    for name in attributes:
        if isinstance(getattr(type(value), name, None), property | functools.cached_property):
            return value
        try:
            value = getattr(value, name)
        except AttributeError:  # it is set later
            return value
    return value
