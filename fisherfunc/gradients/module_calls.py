"""Calls of the modules inside a model, seen by whoever asks to: it runs them, or answers in their place.

The private copy of a module (models/functionalize.py) has `watched` forward methods; nothing else is changed by them.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

Answer = Callable[[str, Callable[[], Any]], Any]
"""(the module's name in the model, what its forward method would do) → what the caller gets."""

_answer: ContextVar[Answer | None] = ContextVar("answer", default=None)


@contextmanager
def answered_by(answer: Answer) -> Iterator[None]:
    """Inside, calls of watched modules are answered by a function."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def watch(name: str, module: nn.Module) -> None:
    """Have the calls of a module answered where that is asked for; one whose forward method is its own is left alone.

    Args:
        name: What it is called.
        module: It does not keep itself alive by this.
    """
    if "forward" in vars(module):
        return
    plain, itself = type(module).forward, weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        answer = _answer.get()
        if answer is None:
            return plain(itself(), *args, **kwargs)
        return answer(name, lambda: plain(itself(), *args, **kwargs))

    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
    module.forward = forward
