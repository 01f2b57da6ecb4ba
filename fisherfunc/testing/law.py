"""Laws as data: what must hold of a part, by how much it may fail, and what examples it is tried on.

A law says by how much an example breaks it, `deviation(part, example)`, relative to the size of what it compares; it
holds where that is at most its tolerance. Hypothesis looks for an example that breaks it, and shrinks what it finds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor, nn


class BrokenPartError(Exception):
    """The part that is tried raised an exception, or returned what it must not."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """What holds of every part of a kind.

    Attributes:
        name: One word; the id of a test.
        statement: What holds, in a sentence.
        applies_to: "kernel", "metric", "loss", "rule", "rows" or "operator".
        tolerance: The largest deviation that is round-off; 0 where there is none.
        examples: Makes the strategy of examples.
        deviation: (part, example) → by how much the example breaks the law; NaN breaks it.
    """

    name: str
    statement: str
    applies_to: str
    tolerance: float
    examples: Callable[[], st.SearchStrategy[Any]]
    deviation: Callable[[Callable[..., Any], Any], float]

    def __str__(self) -> str:
        """Name it, as the id of a test."""
        return self.name

    def check(
        self, part: Callable[..., Any], *, max_examples: int = 100, examples: st.SearchStrategy[Any] | None = None
    ) -> "Failure | None":
        """Look for an example that breaks the law, and shrink it; None where none is found. The same every time.

        Args:
            part: What is tried.
            max_examples: How many examples are tried.
            examples: Other examples than those of the law.
        """
        watched, examples = _watched(part), self.examples() if examples is None else examples
        phases = [Phase.generate, Phase.shrink]
        quick = settings(max_examples=max_examples, deadline=None, database=None, derandomize=True, phases=phases)
        try:
            example = find(examples, lambda found: bool(self._off(watched, found)), settings=quick)
        except NoSuchExample:
            return None
        return Failure(law=self, reason=self._off(watched, example), example=example)

    def _off(self, part: Callable[..., Any], example: Any) -> str:
        """What is wrong; nothing where the law holds."""
        try:
            deviation = float(self.deviation(part, example))
        except BrokenPartError as error:
            return str(error)
        return "" if deviation <= self.tolerance else f"off by {deviation:.3g}, allowed {self.tolerance:g}"


def laws_for(
    applies_to: str, examples: Callable[[], st.SearchStrategy[Any]]
) -> Callable[[str, str, float, Callable[[Callable[..., Any], Any], float]], Law]:
    """Return a maker of laws of one kind: (name, statement, tolerance, deviation) → law."""

    def law(name: str, statement: str, tolerance: float, deviation: Callable[[Callable[..., Any], Any], float]) -> Law:
        return Law(
            name=name,
            statement=statement,
            applies_to=applies_to,
            tolerance=tolerance,
            examples=examples,
            deviation=deviation,
        )

    return law


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A law that does not hold.

    Attributes:
        law: Which.
        reason: By how much it is broken, or what was raised.
        example: The smallest example that was found; None of a waiver.
    """

    law: Law
    reason: str
    example: Any

    @property
    def code(self) -> str:
        """The example as Python that can be pasted, behind `import torch` and `from fisherfunc.testing import *`."""
        return "example = " + as_code(self.example)

    def __str__(self) -> str:
        """Say what holds, what was found, and where."""
        return f"{self.law.name}: {self.law.statement} {self.reason}\n{self.code}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was tried on a part.

    Attributes:
        held: The names of the laws that hold, or are waived.
        failures: Those that do not, and waivers of laws that do; empty where all is well.
    """

    held: tuple[str, ...]
    failures: tuple[Failure, ...]

    def __str__(self) -> str:
        """List the failures."""
        return "\n\n".join(map(str, self.failures)) or f"all hold: {', '.join(self.held)}"


def check_laws(
    laws: Sequence[Law],
    part: Callable[..., Any],
    *,
    waive: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    max_examples: int = 100,
    examples: st.SearchStrategy[Any] | None = None,
) -> Report:
    """Try laws on a part.

    Args:
        laws: Which.
        part: On what.
        waive: {name of a law: why it need not hold}; a waiver of a law that holds is a failure.
        tolerance: In place of that of the laws that have one, for parts that compute in a coarser dtype.
        max_examples: How many examples a law is tried on.
        examples: Other examples than those of the laws.

    Raises:
        ValueError: If a waiver names no law.
    """
    waive = waive or {}
    unknown = set(waive) - {law.name for law in laws}
    if unknown:
        raise ValueError(f"waive expected names of {[law.name for law in laws]}, got {sorted(unknown)}")
    held, failures = [], []
    for law in laws:
        allowed = law if tolerance is None or law.tolerance == 0 else replace(law, tolerance=tolerance)
        failure = allowed.check(part, max_examples=max_examples, examples=examples)
        if law.name in waive and failure is None:
            reason = f"It holds, though it is waived ({waive[law.name]}): take the waiver out."
            failures.append(Failure(law=law, reason=reason, example=None))
        elif law.name in waive or failure is None:
            held.append(law.name)
        else:
            failures.append(failure)
    return Report(held=tuple(held), failures=tuple(failures))


def as_code(value: Any) -> str:
    """Write a value as a Python expression.

    Example:
        >>> as_code((torch.tensor([1.0], dtype=torch.float64), {"a": 2}))
        "(torch.tensor([1.0], dtype=torch.float64), {'a': 2})"
    """
    if isinstance(value, Tensor):
        return f"torch.tensor({value.tolist()}, dtype={value.dtype})"
    if isinstance(value, nn.Module) and hasattr(value, "made_with"):
        return f"with_weights({type(value).__name__!r}, {value.made_with}, {as_code(dict(value.state_dict()))})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {as_code(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({', '.join(map(as_code, value))})"
    if isinstance(value, tuple | list):
        inside = ", ".join(map(as_code, value)) + ("," if isinstance(value, tuple) and len(value) == 1 else "")
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{entry.name}={as_code(getattr(value, entry.name))}" for entry in fields(value))
        return f"{type(value).__name__}({inside})"
    return getattr(value, "__name__", repr(value))


def relative(found: Tensor, wanted: Tensor, *, to: Tensor | float | None = None) -> float:
    """Return the largest difference over a size, else over that of what is wanted; infinite of other shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.abs().max() if to is None and wanted.numel() else torch.as_tensor(0.0 if to is None else to))
    return float((found - wanted).abs().max()) / (size or 1.0) if wanted.numel() else 0.0


def _watched(part: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        try:
            return part(*arguments, **options)
        except BrokenPartError:
            raise
        except Exception as error:  # whatever a part of the user's raises is a finding, and is reported as one
            raise BrokenPartError(f"It raised {type(error).__name__}: {error}") from error

    return called
