"""One case and its verdict.

| verdict | when |
| --- | --- |
| right | the Grams are those of the loop: ‖K − K*‖ ≤ 1e-9 ‖K*‖ + 1e-13 ‖K*_all‖ for each parameter or block |
| refused | ValueError or TypeError, raised in a file of the package |
| changed | something of the user's is not bitwise what it was |
| wrong | other Grams, other rows, or numbers where the loop has none or samples meet |
| failed | any other exception |
"""

import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherfunc as ff
from benchmarks.laws.batches import Piece, given, pieces
from benchmarks.laws.loop import MEETING, ROUNDING, Expected, Loop, expected
from benchmarks.laws.model import module
from benchmarks.laws.picture import changes, picture
from benchmarks.laws.recipe import LANGUAGE, Recipe

VERDICTS = ("right", "refused", "wrong", "changed", "failed")
BAD = ("wrong", "changed", "failed")
OF_OWN, OF_ALL = 1e-9, 1e-13
_PACKAGE = Path(ff.__file__).parent
_BLOCKS: dict[str | None, Callable[[str], str]] = {"by_layer": ff.by_layer, "whole": ff.whole, None: lambda name: name}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is kept of a case.

    Attributes:
        seed: Of the case.
        verdict: One of `VERDICTS`.
        reason: The error, what was changed, or how far off which Gram is.
        meets: Whether the samples of a batch meet; None where nothing can be said.
        seconds: It took.
    """

    seed: int
    verdict: str
    reason: str
    meets: bool | None
    seconds: float


@dataclass(frozen=True)
class Case:
    """What a recipe makes."""

    model: nn.Module
    pieces: list[Piece]
    batch: Any


def built(recipe: Recipe) -> Case:
    """The module and the batch, the same each time; torch's generator stays where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model, parts = module(recipe), pieces(recipe)
        if recipe.used:
            with torch.no_grad(), suppress(Exception):  # a module that does not take one sample is as that left it
                model(**parts[0].rows(slice(0, 1)))
    return Case(model, parts, given(recipe, parts))


def judged(recipe: Recipe) -> Row:
    """Run a case."""
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict, reason, meets = _judged(recipe)
    return Row(seed=recipe.seed, verdict=verdict, reason=reason, meets=meets, seconds=time.perf_counter() - begin)


def _judged(recipe: Recipe) -> tuple[str, str, bool | None]:
    case = built(recipe)
    before = picture(case.model, case.batch)
    error, got = None, None
    try:
        got = _grams(recipe, case)
    except Exception as raised:  # the verdict of the case
        error = raised
    changed = changes(before, picture(case.model, case.batch))
    truth = _truth(recipe, got)
    meets = None if truth is None else _meets(recipe, truth)
    told = "" if error is None else f"{type(error).__name__}: {error}"
    if changed:
        return "changed", ", ".join([*changed[:5], told]), meets
    if error is not None:
        return ("refused" if is_ours(error) else "failed"), told, meets
    assert got is not None
    if truth is None:
        return "wrong", "the loop itself fails, or gives what is not finite", meets
    if meets:
        return "wrong", f"the samples of a batch meet: they differ by {truth.meeting:.1e}", meets
    off = difference(recipe, got, truth)
    return ("right" if off is None else "wrong"), off or "", meets


def _grams(recipe: Recipe, case: Case) -> ff.TokenGrams:
    fn = ff.functionalize(case.model)
    loss = ff.losses.classification() if recipe.task in ("pooled", "positions") else getattr(ff.losses, recipe.task)()
    options = {key: value for key, value in recipe.options.items() if key != "blocks"}
    return ff.token_grams(fn, fn.params, case.batch, loss, blocks=_BLOCKS[recipe.options.get("blocks")], **options)


def _truth(recipe: Recipe, got: ff.TokenGrams | None) -> Expected | None:
    """What the loop finds on a case made anew; None where it fails, or gives what is not finite."""
    case = built(recipe)
    loop = Loop(case.model, recipe.task, labels=recipe.labels == "used" and recipe.task in LANGUAGE)
    only = None
    if got is not None and "num_tokens" in recipe.options:
        only = set(zip(got.tokens.sequence.tolist(), got.tokens.position.tolist(), strict=True))
    try:
        found = expected(loop, case.pieces, only=only)
    except Exception:  # the user's module does not take one sample
        return None
    return found if all(bool(rows.isfinite().all()) for rows in found.rows.values()) else None


def _meets(recipe: Recipe, truth: Expected) -> bool | None:
    """Whether samples meet; what draws random numbers differs in a batch as it is, and is not asked."""
    if truth.meeting is None or recipe.draws or ROUNDING < truth.meeting <= MEETING:
        return None
    return truth.meeting > MEETING


def is_ours(error: BaseException) -> bool:
    """Whether an error is a ValueError or TypeError raised in a file of the package."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError | TypeError) and _PACKAGE in Path(frames[-1].filename).parents


def difference(recipe: Recipe, got: ff.TokenGrams, truth: Expected) -> str | None:
    """What is not as the loop has it."""
    places = [(term.sequence, term.position) for term in truth.terms]
    sequences = got.tokens.sequence.tolist()
    limit = recipe.options.get("num_tokens", len(places))
    if recipe.options.get("unit") == "sequence":
        order = sorted({sequence for sequence, _ in places})
        pick = torch.tensor([[float(n == sequence) for n, _ in places] for sequence in order], dtype=torch.float64)
        if sequences != order:
            return f"rows are sequences {sequences}, expected {order}"
    else:
        here = list(zip(sequences, got.tokens.position.tolist(), strict=True))
        wanted = [place for place in places if place in here] if limit < len(places) else places
        if here != wanted or len(here) != min(limit, len(places)):
            return f"rows are {here[:20]}, expected {min(limit, len(places))} of {places[:20]}"
        pick = torch.eye(len(places), dtype=torch.float64)[[places.index(place) for place in here]]
    label = _BLOCKS[recipe.options.get("blocks")]
    grams: dict[str, Tensor] = {}
    for name, rows in truth.rows.items():
        grams[label(name)] = grams.get(label(name), torch.zeros(())) + (pick @ rows) @ (pick @ rows).mT
    if set(got.grams) != set(grams):
        return f"blocks are {sorted(got.grams)}, expected {sorted(grams)}"
    whole = float(torch.stack(list(grams.values())).sum(0).norm())
    off = {
        n: float((got.grams[n] - k).norm() / (k.norm() + OF_ALL / OF_OWN * whole + 1e-300)) for n, k in grams.items()
    }
    worst = max(off, key=lambda name: (off[name] != off[name], off[name]))
    return None if off[worst] <= OF_OWN else f"{worst} is off by {off[worst]:.1e}; {got.metadata['route']} route"
