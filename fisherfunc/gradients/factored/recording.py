"""What a recorder of a forward pass is told, and what it saw (_taps.py)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fisherfunc.gradients.factored.calls import Call, Made
from fisherfunc.gradients.factored.rules import Map, Role
from fisherfunc.gradients.factored.shortcuts import Origins
from fisherfunc.gradients.factored.skips import ModuleCall


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a parameter.

    Attributes:
        name: The parameter.
        size: How many entries it has.
        number: How many uses of the same parameter came before it.
        output: What the function returned, in the graph.
        version: Of `output`, to see whether it was written to later.
        role: What the function did with the parameter.
    """

    name: str
    size: int
    number: int
    output: Tensor
    version: int
    role: Role

    @property
    def multiplies(self) -> bool:
        """Whether it is a linear map of vectors."""
        return isinstance(self.role, Map) and self.role.multiplies


@dataclass
class Recording:
    """What was seen of one forward pass.

    Attributes:
        uses: Of the parameters that were watched, in order.
        unknown: Parameters used in a way that no rule knows, and the function that did.
        end: Where the pass was cut short: the input of the last linear map, or a cut.
        shortcuts: Those that were taken.
        crooked: The uses whose inputs no shortcut leads to, of those that were to have one.
        made: {graph node and which output of it: what was made}, where asked for.
        modules: The calls of modules, in the order in which they ended, where asked for.
        cut: The cut that was asked for, and its version.
        values: {call: what it made, and its version}, where asked for.
    """

    uses: list[Use] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    end: Tensor | None = None
    shortcuts: dict[tuple[str, int], Origins] = field(default_factory=dict)
    crooked: set[tuple[str, int]] = field(default_factory=set)
    made: dict[tuple[Any, int], Made] = field(default_factory=dict)
    modules: list[ModuleCall] = field(default_factory=list)
    cut: tuple[Tensor, int] | None = None
    values: dict[Call, tuple[Tensor, int]] = field(default_factory=dict)

    def overwritten(self) -> set[str]:
        """Parameters whose output was changed in place after it was kept."""
        return {use.name for use in self.uses if use.output._version != use.version}

    def cut_tensor(self) -> Tensor | None:
        """The cut that was asked for; None where it was not made, or changed in place later."""
        return self.cut[0] if self.cut is not None and self.cut[0]._version == self.cut[1] else None


class Reached(BaseException):
    """Ends a forward pass where the rest is not needed; no error, so no handler of the model may take it."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """What the recorder does beside looking.

    Attributes:
        protected: Parameters whose outputs the model writes to: it gets copies of them to write to.
        width: The sequences of the stack; of what they share each gets its own.
        shortcuts: {use: the uses that its input is an elementwise function of} (see shortcuts.py).
        verify: Whether to test that these functions are elementwise.
        discover: Whether to look for shortcuts, and take those that are found.
        last: The use of the last linear map, where the pass is to end before it.
        stop: The call after which the pass is to end.
        keep: The call whose tensor is to be kept as a cut.
        note: Whether to say what every call made, and which modules were called.
        values: The calls of which to keep the values.
        floor: A call whose value is known: the pass goes on from it. Linear maps before it are neither computed nor
            recorded: what leads to this value, and that alone, is NaN then.
        known: The value.
        skipped: {module: its call}: below the floor it is not called.
    """

    protected: frozenset[str] = frozenset()
    width: int = 1
    shortcuts: Mapping[tuple[str, int], Origins] = field(default_factory=dict)
    verify: bool = True
    discover: bool = False
    last: tuple[str, int] | None = None
    stop: Call | None = None
    keep: Call | None = None
    note: bool = False
    values: frozenset[Call] = frozenset()
    floor: Call | None = None
    known: Tensor | None = None
    skipped: Mapping[str, ModuleCall] = field(default_factory=dict)
