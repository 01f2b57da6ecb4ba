"""One row of the sweep: a model is built, the loop is run, then `ff.token_grams`, and their Grams are compared.

The error of a parameter is ‖K − K*‖ / (‖K*‖ + eps · ‖K*_all‖), eps that of the coarsest dtype inside the model: what is
zero but for round-off (a key bias) has gradients of eps times the others, and so a Gram of eps² times theirs. An error
may be `ROUNDINGS` · eps: a gradient passes through some 50 operations of 32 terms each, and enters its Gram twice.
"""

import resource
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor

import fisherfunc as ff
from benchmarks.zoo import adapters, images, language
from benchmarks.zoo.case import Case
from benchmarks.zoo.loop import Truth, loop

ROUNDINGS = 4096  # 2 · 50 · 32, rounded up to a power of two
MEMORY = 8 * 10**9  # bytes that one model may take: another configuration than expected must not end the machine
VERDICTS = ("right", "refused", "wrong", "failed", "not built", "over time")
KINDS = (*language.KINDS, "adapters", "images")
_LONGEST_REASON = 300


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the sweep.

    Attributes:
        kind: A key of `KINDS`.
        name: Its name in the library that it comes from.
        verdict: "right", "refused" (by an error of fisherfunc's own), "wrong" (another result, or the module was
            changed), "failed" (any other error), "not built" (or the model itself does not run) or "over time".
        reason: Where it is not right.
        model: The class, and what else tells it.
        parameters: How many numbers are trained.
        tokens: N.
        dtype: The coarsest inside.
        route: That fisherfunc took.
        error: The largest of any parameter.
        tolerance: What it may be.
        seconds: Of processor time.
    """

    kind: str
    name: str
    verdict: str
    reason: str = ""
    model: str = ""
    parameters: int = 0
    tokens: int = 0
    dtype: str = ""
    route: str = ""
    error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0


def names(kind: str) -> list[str]:
    """What a kind has; for optional libraries nothing where they are missing."""
    if kind in language.KINDS:
        return list(language.names(kind))
    return adapters.names() if kind == "adapters" else images.names()


def judge(kind: str, name: str, limit_s: int) -> Row:
    """The row of a model, for a process of its own, which the system ends after `limit_s` of processor time.

    Processor time, so that whether a model comes to an end does not depend on what else the machine does.
    """
    begin = process_time()
    limit_this_process(resource.RLIMIT_DATA, MEMORY)
    limit_this_process(resource.RLIMIT_CPU, limit_s)
    warnings.simplefilter("ignore")
    row = partial(Row, kind=kind, name=name)
    try:
        case, truth = _built(kind, name)
    except Exception as error:  # whatever a library of others raises is the reason of this row
        return row(verdict="not built", reason=_brief(error), seconds=process_time() - begin)
    facts = {
        "model": getattr(case.model, "zoo_name", type(case.model).__name__),
        "parameters": sum(p.numel() for p in case.model.parameters() if p.requires_grad),
        "tokens": truth.num_tokens,
        "dtype": str(truth.dtype).removeprefix("torch."),
    }
    return row(**facts, **verdict(case, truth), seconds=process_time() - begin)


def limit_this_process(what: int, most: int) -> None:
    """Let the system end this process, or refuse it memory, beyond a limit."""
    resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def verdict(case: Case, truth: Truth) -> dict[str, Any]:
    """What fisherfunc makes of a case, held to the truth."""
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    fn = ff.functionalize(case.model)
    try:
        grams = ff.token_grams(fn, fn.params, dict(case.batch), getattr(ff.losses, case.loss)())
    except Exception as error:  # the verdict of this row
        return {"verdict": "refused" if _is_ours(error) else "failed", "reason": _brief(error)}
    found: dict[str, Any] = {"route": grams.metadata["route"]}
    if grams.metadata["route"] == "dense":
        found["reason"] = grams.metadata["route_reason"]
    errors = gram_errors(grams.grams, truth)
    worst = max(errors, key=lambda name: errors[name])
    found |= {"error": errors[worst], "tolerance": ROUNDINGS * torch.finfo(truth.dtype).eps}
    after = case.model.state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    if changed:
        return {**found, "verdict": "wrong", "reason": f"{changed[0]} of the model was written to"}
    if not errors[worst] <= found["tolerance"]:
        return {**found, "verdict": "wrong", "reason": f"worst at {worst}; {found.get('reason', '')}"}
    return {**found, "verdict": "right"}


def gram_errors(grams: Mapping[str, Tensor], truth: Truth) -> dict[str, float]:
    """{name: error}; infinite where a Gram is missing, of another shape or not finite."""
    wanted = {name: rows @ rows.T for name, rows in truth.gradients.items()}
    floor = torch.finfo(truth.dtype).eps * torch.linalg.matrix_norm(torch.stack([*wanted.values()]).sum(0))
    errors = {name: float("inf") for name in {*grams} ^ {*wanted}}
    for name in {*grams} & {*wanted}:
        gram, want = grams[name].double(), wanted[name]
        alike = gram.shape == want.shape and bool(gram.isfinite().all())
        distance = torch.linalg.matrix_norm(gram - want) if alike else torch.tensor(float("inf"))
        errors[name] = float(distance / (torch.linalg.matrix_norm(want) + floor))
    return errors


def _built(kind: str, name: str) -> tuple[Case, Truth]:
    """In float64; in float32 where the architecture does not run in float64, or not to a finite gradient."""
    try:
        return _built_in(kind, name, torch.float64)
    except (RuntimeError, FloatingPointError) as error:
        if not any(word in str(error).lower() for word in ("dtype", "float", "finite")):
            raise
        return _built_in(kind, name, torch.float32)


def _built_in(kind: str, name: str, dtype: torch.dtype) -> tuple[Case, Truth]:
    torch.manual_seed(0)
    if kind in language.KINDS:
        case = language.build(kind, name, dtype)
    else:
        case = (adapters if kind == "adapters" else images).build(name, dtype)
    truth = loop(case)
    if not all(bool(rows.isfinite().all()) for rows in truth.gradients.values()):
        raise FloatingPointError("its own gradients are not finite")
    if not any(bool(rows.any()) for rows in truth.gradients.values()):
        raise ValueError("its own gradients are all zero")
    return case, truth


def _is_ours(error: Exception) -> bool:
    """Whether fisherfunc itself raised it, in its words."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError | TypeError) and Path(last).is_relative_to(Path(ff.__file__).parent)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST_REASON]}{' …' if len(text) > _LONGEST_REASON else ''}"
