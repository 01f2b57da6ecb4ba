"""Which installed package a function or class is of: then its name says what it is. Code of the user's is of none."""

import builtins
import functools
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

OURS = __name__.split(".")[0]


def module_of(function: FunctionType) -> str:
    """The module whose variables a function reads; `__module__` may be another's, as `functools.wraps` copies it."""
    name = str(function.__globals__.get("__name__"))
    return name if vars(sys.modules.get(name, builtins)) is function.__globals__ else "__main__"


def reached(cls: type) -> bool:
    """Whether a class is where its names say: not one of the user's that took another's names."""
    value: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        value = getattr(value, name, None)
    return value is cls


@functools.cache
def package_of(module: str) -> str | None:
    """The package that a module is of, with its version but for those that any result names; None of the user's own."""
    top = module.partition(".")[0]
    if top in (OURS, "torch") or top in sys.builtin_module_names:
        return top
    if top == "__main__":
        return None
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module without a specification, made by hand
        return None
    if spec is None or spec.origin is None:
        return None
    if spec.origin == "frozen":
        return top
    path = Path(spec.origin)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return f"{top} {getattr(sys.modules.get(top), '__version__', '')}"
    return top if path.is_relative_to(sysconfig.get_paths()["stdlib"]) else None
