"""What a recorder of a forward pass is told, and what it saw (_taps.py)."""

from dataclasses import dataclass, field

from torch import Tensor

from fisherfunc.gradients.capture.calls import ModuleCall, Output, Way
from fisherfunc.gradients.capture.rules import Map, Role


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


State = tuple[int, int]
"""How often a tensor was written to, and how many hooks its cotangent goes through."""


def state_of(tensor: Tensor) -> State:
    """To see whether a tensor was changed later."""
    return tensor._version, len(tensor._backward_hooks or ())


@dataclass
class Recording:
    """What was seen of one forward pass.

    Attributes:
        uses: Of the parameters that were watched, in order.
        unknown: Parameters used in a way that no rule knows, and the function that did.
        end: Where the pass was cut short: the input of the last linear map.
        modules: The calls of modules, in the order in which they ended, where asked for.
        num_bytes: How many bytes were made in the graph, where asked for.
        returned: What the outer calls that were run returned, and its state then (`state_of`).
        played: What was played back in the place of the others: leaves of the graph.
        uses_below: How many uses there were until the last of these.
        astray: Whether the outer calls were others than expected.
        differentiates: Whether a gradient was taken before the pass had ended, inside the model or its loss.
        interrupted: Whether the pass was ended as it would have needed what a recorded pass has no graph of.
    """

    uses: list[Use] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    end: Tensor | None = None
    modules: list[ModuleCall] = field(default_factory=list)
    num_bytes: int = 0
    returned: dict[Output, tuple[Tensor, State]] = field(default_factory=dict)
    played: dict[Output, Tensor] = field(default_factory=dict)
    uses_below: int = 0
    astray: bool = False
    differentiates: bool = False
    interrupted: bool = False

    def uses_here(self) -> list[Use]:
        """The uses after the last call that was played back."""
        return self.uses[self.uses_below :]

    def overwritten(self) -> set[str]:
        """Parameters whose output was changed in place after it was kept."""
        return {use.name for use in self.uses if use.output._version != use.version}


class Reached(BaseException):
    """Ends a forward pass where the rest is not needed; no error, so no handler of the model may take it."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """What the recorder does beside looking.

    Attributes:
        protected: Parameters whose outputs the model writes to: it gets copies of them to write to.
        width: The sequences of the stack; of what they share each gets its own.
        last: The use of the last linear map, where the pass is to end before it.
        note: Whether to say which modules were called.
        way: What to play back, and where to end (segments.py).
    """

    protected: frozenset[str] = frozenset()
    width: int = 1
    last: tuple[str, int] | None = None
    note: bool = False
    way: Way | None = None
