"""The parts that modules are made of: each takes activations `(b, s, d)` and which positions are kept `(b, s)`.

`PARTS` names them all; `MEETING` are those in which the samples of a batch meet, `UNFOLLOWED` those whose parameters no
gradient can follow: what has one of them is to be refused, so they are drawn more rarely. `DRAWING` draw at random.
"""

from collections.abc import Callable

from torch import nn

from benchmarks.laws.parts.differentiating import DIFFERENTIATING
from benchmarks.laws.parts.keeping import KEEPING
from benchmarks.laws.parts.meeting import MEETING
from benchmarks.laws.parts.pure import DRAWING, PURE
from benchmarks.laws.parts.writing import WRITING

PARTS: dict[str, Callable[[int], nn.Module]] = {**PURE, **KEEPING, **WRITING, **DIFFERENTIATING, **MEETING}
UNFOLLOWED = ("listed", "adds a part", "writes as a vector", "writes frozen as a vector")

__all__ = ["DRAWING", "MEETING", "PARTS", "UNFOLLOWED"]
