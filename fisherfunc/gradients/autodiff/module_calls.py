"""Calls of the modules inside a model, seen by whoever asks to: it runs them, or answers in their place.

The copy of a module that such a call runs (models/functionalize.py) has its parts `watched`. That takes the hook which
torch has for modules that are compiled in place: their forward methods stay as they are, and copies of them are not
watched.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

HOOK = "_compiled_call_impl"
"""The attribute of a module that torch calls instead of it."""

Answer = Callable[[str, Callable[[], Any]], Any]
"""(the module's name in the model, what a call of it would do) → what the caller gets."""


class Again(BaseException):
    """Ends a recorded call of a model that is to be made again, as another will be given other tensors."""


_answer: ContextVar[Answer | None] = ContextVar("answer", default=None)


@contextmanager
def answered_by(answer: Answer) -> Iterator[None]:
    """Inside, calls of watched modules are answered by a function."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def is_answered() -> bool:
    """Whether calls of watched modules are answered by a function here."""
    return _answer.get() is not None


def watch_parts(model: nn.Module) -> None:
    """Have the calls of all modules inside a model answered where that is asked for.

    Left alone are those that have that hook already, that are TorchScript, or that are replicated with all inside.
    """
    as_a_whole = (torch.jit.ScriptModule, nn.DataParallel, nn.parallel.DistributedDataParallel)
    above: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, as_a_whole):
            above += (f"{name}.",)
        elif name and not name.startswith(above) and HOOK not in vars(module):
            _watch(name, module)


def _watch(name: str, module: nn.Module) -> None:
    itself = weakref.ref(module)  # a module does not keep itself alive

    def called(*args: Any, **kwargs: Any) -> Any:
        answer, me = _answer.get(), itself()
        assert me is not None
        if answer is None:
            return me._call_impl(*args, **kwargs)
        return answer(name, lambda: me._call_impl(*args, **kwargs))

    setattr(module, HOOK, called)
