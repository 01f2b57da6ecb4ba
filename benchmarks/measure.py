"""One measurement: a contender on a task, in the process that this is called in."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.contenders import contender
from benchmarks.contenders.common import CannotError, Options, Work, on_cpu
from benchmarks.oracle import TOLERANCE, Oracle, check, oracle, summary
from benchmarks.process import peak_memory, settled_memory
from benchmarks.tasks import Described, Task, build
from fisherfunc.runtime.clock import clock

OK, WRONG, CANNOT = "ok", "wrong", "cannot"


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """How often: at most `most`, and no more once `budget_s` are spent."""

    most: int = 3
    budget_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of a contender.

    Attributes:
        label: The contender's title in the table.
        status: "ok", "wrong" (its eigenvalues differ: no time) or "cannot".
        reason: Why not ok, in words.
        gives: What the user gets.
        num_rows: Rows measured.
        seconds: The least of all repetitions; None unless ok.
        all_seconds: Of each repetition; empty unless ok.
        peak_bytes: Resident memory at its peak beyond the loaded model; None unless ok.
        error: The largest |λ − λ*|/λ*_max.
        compared: What of the eigenvalues was compared.
        spectra: Block → leading eigenvalues and trace, where spectra are part of the job.
    """

    label: str
    status: str
    reason: str | None = None
    gives: str = ""
    num_rows: int = 0
    seconds: float | None = None
    all_seconds: Sequence[float] = ()
    peak_bytes: int | None = None
    error: float | None = None
    compared: str = ""
    spectra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, as JSON gives them back."""
        return {**asdict(self), "all_seconds": list(self.all_seconds)}


def measure(
    label: str,
    name: str,
    task: Described,
    options: Options,
    repeats: Repeats,
    truth: str | None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Build the task, warm up, time, and only then look at the oracle.

    Args:
        label: What the table calls it.
        name: Of the contender.
        task: Name, sizes and device of the task.
        options: How to run.
        repeats: How often.
        truth: The file with the oracle.
        tolerance: Of the check.
    """
    return measure_task(label, name, build(*task), options, repeats, truth, tolerance).to_dict()


def measure_task(
    label: str,
    name: str,
    task: Task,
    options: Options,
    repeats: Repeats,
    truth: str | None,
    tolerance: float = TOLERANCE,
) -> Measurement:
    """As `measure`, of a task at hand."""
    prepare = contender(name)
    try:
        work = prepare(task, options)
        _warm(work, lambda: prepare(task.small(), replace(options, rows=None)).run())
    except CannotError as error:
        return Measurement(label=label, status=CANNOT, reason=str(error))
    except ImportError as error:
        return Measurement(label=label, status=CANNOT, reason=f"not installed, or not importable: {error}")
    except Exception as error:  # a library may raise anything on a model it does not know: the table says what it said
        return Measurement(label=label, status=CANNOT, reason=f"{type(error).__name__}: {error}")
    seconds, peak, outcome = timed(work, repeats, task.device)
    answer = on_cpu(work.answer(outcome))
    found = Measurement(
        label=label,
        status=OK,
        gives=work.gives,
        num_rows=len(options.rows) if options.rows is not None else task.num_rows,
        seconds=min(seconds),
        all_seconds=tuple(seconds),
        peak_bytes=peak,
        spectra=summary(answer),
    )
    return judged(found, answer, load_oracle(truth), tolerance) if truth is not None else found


def timed(work: Work, repeats: Repeats, device: torch.device) -> tuple[list[float], int, Any]:
    """Seconds of each repetition, the peak of memory beyond what was there before, and the last outcome."""
    base, seconds, outcome = settled_memory(device), [], None
    while not seconds or (len(seconds) < repeats.most and sum(seconds) < repeats.budget_s):
        outcome = None  # what the last repetition made does not count in the next
        if work.before is not None:
            work.before()
        begin = clock(device)
        outcome = work.run()
        seconds.append(clock(device) - begin)
    return seconds, max(0, peak_memory(device) - base), outcome


def judged(found: Measurement, answer: Any, truth: Oracle, tolerance: float = TOLERANCE) -> Measurement:
    """The measurement with the verdict; without its time where its eigenvalues are wrong."""
    verdict = check(answer, truth, tolerance=tolerance)
    error = verdict.error if math.isfinite(verdict.error) else None  # JSON has no NaN
    found = replace(found, error=error, compared=verdict.compared)
    if verdict.reason is None:
        return found
    return replace(found, status=WRONG, reason=verdict.reason, seconds=None, all_seconds=(), peak_bytes=None)


def write_oracle(task: Described, count: int | None, path: str) -> None:
    """Compute the oracle of a task into a file."""
    truth = oracle(build(*task), count)
    torch.save({"rows": truth.rows, "num_rows": truth.num_rows, "grams": dict(truth.grams)}, path)


def load_oracle(path: str) -> Oracle:
    """The oracle in a file."""
    return Oracle(**torch.load(os.fspath(path), weights_only=True))


def _warm(work: Work, otherwise: Any) -> None:
    (work.warm or otherwise)()
