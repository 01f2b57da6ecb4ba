"""The parts that modules are made of: each takes activations `(b, s, d)` and which positions are kept `(b, s)`.

`PARTS` names them all, and how often each is drawn; `MEETING` are those in which the samples of a batch may meet, which
are drawn more rarely, as what has one of them is to be refused; `DRAWING` those that draw random numbers.
"""

from collections.abc import Callable

from torch import nn

from benchmarks.laws.parts.differentiating import DIFFERENTIATING
from benchmarks.laws.parts.keeping import KEEPING
from benchmarks.laws.parts.meeting import MEETING
from benchmarks.laws.parts.pure import DRAWING, PURE
from benchmarks.laws.parts.writing import WRITING

PARTS: dict[str, Callable[[int], nn.Module]] = {**PURE, **KEEPING, **WRITING, **DIFFERENTIATING, **MEETING}

__all__ = ["DRAWING", "MEETING", "PARTS"]
