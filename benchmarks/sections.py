"""The sections of a run of fisherfunc: which functions they are made of, and how these are timed.

A function is replaced where it is looked up: in the module that imported it by name, which need not be its own.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import fisherfunc as ff
from benchmarks.stopwatch import Stopwatch
from fisherfunc.gradients import alone, by_route, grams, start
from fisherfunc.gradients.factored import collect, route, starts
from fisherfunc.gradients.factors import contract

_END = object()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A function whose time counts to a section; several may share a title.

    Attributes:
        owner: The module, or class, that the function is looked up in.
        name: Of the function there.
        title: Of the section.
        opaque: Whether all that it calls counts to it, functions of other sections included.
    """

    owner: ModuleType | type
    name: str
    title: str
    opaque: bool = False


BACKWARD = "backward passes"
FACTORS = "factors taken out of them"
CONTRACTION = "contraction to Grams"
_MODEL = "the model as a function, in its dtype"
_DENSE = "what the dense route takes"
_WHOLE = "forward passes of whole stacks"
METADATA = "metadata, hash of the batch"
CHECK = "check by ordinary backward passes"
_SURVEY = "survey of the tokens"
_PLAN = "plan, probe of the structure"
_TRIAL = "trial on a few tokens"
BEFORE = (_MODEL, _SURVEY, _PLAN, _TRIAL)
"""What comes before the first useful backward pass."""

SECTIONS = (
    Section(owner=ff, name="functionalize", title=_MODEL),
    Section(owner=ff.ModelFunction, name="to", title=_MODEL),
    Section(owner=start, name="prepared", title=_SURVEY),
    Section(owner=route, name="plan_factored", title=_PLAN, opaque=True),
    Section(owner=route, name="tried", title=_TRIAL, opaque=True),
    Section(owner=collect, name="trace", title=_WHOLE),
    Section(owner=collect, name="starts", title="output layer, cotangents to start from"),
    Section(owner=starts, name="trace_prefix", title="forward passes of prefixes"),
    Section(owner=collect, name="pulled_back", title=BACKWARD),
    Section(owner=collect, name="_inputs", title=FACTORS),
    Section(owner=collect, name="pieces_of", title=FACTORS),
    Section(owner=contract.Holder, name="put", title=FACTORS),
    Section(owner=contract.Holder, name="settle", title=CONTRACTION),
    Section(owner=alone, name="add_all", title=CONTRACTION),
    Section(owner=route, name="passed_grams", title="around these: room for Grams, stacks joined, memory let go"),
    Section(owner=route, name="plan_dense", title=_DENSE),
    Section(owner=route, name="dense_grams", title=_DENSE),
    Section(owner=by_route, name="dense_grams", title=_DENSE),
    Section(owner=grams, name="certified", title=CHECK),
    Section(owner=grams, name="round_off", title=CHECK),
    Section(owner=grams, name="provenance_of_rows", title=METADATA),
    Section(owner=by_route, name="factored_run", title=METADATA),
    Section(owner=ff, name="spectrum_of_grams", title="spectra"),
)
"""In the order of a run."""
FLOOR = {BACKWARD: "backward", FACTORS: "forming", CONTRACTION: "contraction"}
"""{title: the part of the floor that is its own}; the floor has no operation for the other sections."""


@contextmanager
def timed_by(watch: Stopwatch, sections: Iterable[Section] = SECTIONS) -> Iterator[None]:
    """Time the functions of some sections in whatever runs inside.

    Raises:
        AttributeError: If there is no such function.
    """
    with ExitStack() as restored:
        for section in sections:
            function = getattr(section.owner, section.name)
            setattr(section.owner, section.name, _timed(function, section, watch))
            restored.callback(setattr, section.owner, section.name, function)
        yield


def _timed(function: Callable[..., Any], section: Section, watch: Stopwatch) -> Callable[..., Any]:
    """The function with its time told to the watch; of a generator, that of each step."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch.section(section.title, opaque=section.opaque):
            return function(*args, **kwargs)

    @wraps(function)
    def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
        iterator = function(*args, **kwargs)
        while True:
            with watch.section(section.title, opaque=section.opaque):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item

    return steps if inspect.isgeneratorfunction(function) else call
