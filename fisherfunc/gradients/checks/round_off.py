"""How far the Grams of a pass are from those of exact arithmetic: measured, with the model in float64 on a few rows.

For some rows S, drawn with probability ∝ K_nn, E = K̂_SS − K_SS is known, and scaled up to all N rows:

    ‖E‖_F² ≈ (Σ_{n∈S} E_nn²/Σ_{n∈S} K_nn²) ‖K‖_F² + (Σ_{n≠m∈S} E_nm²/Σ_{n≠m∈S} K_nn K_mm) ((tr K)² − Σ K_nn²)

The first term lets all entries have the relative error of the diagonal, so that those that the sample missed (of rows
that seldom meet, as in an embedding) count. By Weyl, no eigenvalue of K is off by more than ‖E‖. K is of weights and
inputs as the pass has them: what rounding those to its dtype has changed is not seen.

Eight rows miss one document of thirty whose factors cancel. The check of a run (certificate.py) has seen every row: its
largest difference from an ordinary backward pass, times the trace, is what is stated where that is more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff.nature import InFloat64, coarsest
from fisherfunc.gradients.autodiff.pullback import gradients_by, pulled_back
from fisherfunc.gradients.autodiff.refusals import REFUSALS
from fisherfunc.gradients.capture.structure import Unsettled
from fisherfunc.gradients.data.sequences import Sequences
from fisherfunc.gradients.rows.gradient_rows import one_hot
from fisherfunc.gradients.rows.stacks import neighbours
from fisherfunc.gradients.rows.subsample import EVERY, Coordinates
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.gram import gram_of
from fisherfunc.linalg.grams.divided import AnyGram, entries, squared_norm
from fisherfunc.records.axes import Params
from fisherfunc.records.containers import mapped
from fisherfunc.runtime.grain import grain_of

NUM_ROWS = 8
MARGIN = 3.0
"""What the norm that was scaled up is multiplied by: of eight rows it was seen to be up to three times too small."""


@dataclass(frozen=True, kw_only=True)
class RoundOff:
    """What was measured.

    Attributes:
        errors: {parameter or label: an upper estimate of ‖K̂ − K‖}; None where it could not be measured.
        num_rows: How many rows it rests on.
        reason: Why it could not be measured.
    """

    errors: Mapping[str, float] | None
    num_rows: int = 0
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What results say of it."""
        return {"measured": self.errors is not None, "num_rows": self.num_rows, "reason": self.reason}


def round_off(
    grams: Mapping[str, AnyGram],
    work: Workload,
    differences: Mapping[str, float],
    passed: Callable[[Workload], Mapping[str, Tensor]],
    *,
    labels: Mapping[str, str] | None = None,
    coordinates: Coordinates = EVERY,
    limit: int,
    seed: int = 0,
    stack_width: int = 1,
    formed: int | None = None,
    agreed: Callable[[Callable[[], Any]], Any] | None = None,
) -> RoundOff:
    """Measure the error of Grams on a few rows.

    Cost, in float64: a forward pass of each of up to eight sequences and a backward pass of each of eight rows. What
    the model rounds to another dtype on its way is not rounded.

    Args:
        grams: By parameter or label; all of their rows are finite.
        work: What was passed over.
        differences: {parameter or label: by how much its Gram was seen to differ from backward passes, over its trace}.
        passed: Some rows → their Grams, in the way that those were made.
        labels: {parameter: the label that its Gram was added under}.
        coordinates: The columns that were kept.
        limit: In bytes; the model in float64 takes up to a quarter.
        seed: Of the draw of rows.
        stack_width: How many sequences ran together in the pass: at most as many do here.
        formed: Bytes up to which the gradients of the rows are formed, if a quarter of the limit has room for them;
            larger models take the pass, in float64. What is little on the device (runtime/grain.py) where None.
        agreed: Of ranks, what has one of them compute for all.
    """
    reason = _why_not(work)
    if reason is None and 8 * _num_entries(work) > limit // 4:
        reason = "the memory limit has no room for the model in float64"
    if reason is not None:
        return RoundOff(errors=None, reason=reason)
    rows = _drawn(grams, seed)
    fn = replace(work.fn, params={**work.fn.params, **work.params})
    try:
        fn = fn.to(dtype=torch.float64)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:  # of quantised tensors that have one dtype for good
        reason = f"a weight cannot be cast to float64: {type(error).__name__}: {error}".splitlines()[0]
        return RoundOff(errors=None, reason=reason)
    wide = [replace(part, batch=mapped(_widened, part.batch)) for part in work.sequences.parts]
    params = {name: fn.params[name] for name in work.params}
    chosen = replace(work.select(rows), fn=fn, params=params, sequences=Sequences(wide))
    num_bytes = 8 * len(rows) * sum(work.num_params.values())
    together = max(1, min(stack_width, limit // 4 // max(2 * work.nature.saved_bytes, 1)))
    little = grain_of(rows.device).little if formed is None else formed
    run: Callable[[], Mapping[str, Tensor]] = partial(passed, chosen)
    if num_bytes <= min(little, limit // 8):  # those of a label are put side by side, a copy of them
        run = partial(_formed, chosen, coordinates, labels, together)
    reference = partial(_reference, run)
    exact, reason = reference() if agreed is None else agreed(reference)
    if reason is not None:
        return RoundOff(errors=None, reason=reason)
    return RoundOff(errors=_errors(grams, rows, exact, differences), num_rows=len(rows))


def _reference(run: Callable[[], Mapping[str, Tensor]]) -> tuple[Mapping[str, Tensor], str | None]:
    """The Grams of some rows in float64, on the CPU as ranks send them, or why there are none."""
    try:
        with InFloat64() as arithmetic:
            exact = run()
    except torch.OutOfMemoryError:
        raise
    except (*REFUSALS, Unsettled) as error:
        return {}, f"the model does not run in float64: {type(error).__name__}: {error}".splitlines()[0]
    if arithmetic.rounded:
        return {}, "something in the model is rounded to a coarser dtype when it runs in float64"
    return {label: gram.cpu() for label, gram in exact.items()}, None


def _why_not(work: Workload) -> str | None:
    if coarsest(work.nature.precision, *(p.dtype for p in work.params.values())) == torch.float64:
        return "the pass is in float64"
    if work.nature.draws:
        return "the model draws random numbers"
    if next(iter(work.params.values())).device.type == "mps":
        return "the device has no float64"
    return None


def _num_entries(work: Workload) -> int:
    return sum(p.numel() for p in {**work.fn.frozen, **work.fn.params}.values())


def _drawn(grams: Mapping[str, AnyGram], seed: int) -> Tensor:
    """Some rows, in ascending order, the large ones more likely."""
    diagonal = torch.stack([gram.diagonal().double() for gram in grams.values()]).sum(dim=0).clamp(min=0).cpu()
    weights = (diagonal / diagonal.sum()).nan_to_num().clamp(min=torch.finfo(torch.float64).tiny)
    count = min(NUM_ROWS, len(weights))
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, count, generator=generator).sort().values.to(next(iter(grams.values())).device)


def _errors(
    grams: Mapping[str, AnyGram], rows: Tensor, exact: Mapping[str, Tensor], differences: Mapping[str, float]
) -> dict[str, float]:
    """Upper estimates of ‖K̂ − K‖, from submatrices of K and differences seen over the traces of K."""
    exact = {label: exact[label].to(rows.device) for label in grams}
    error = torch.stack([entries(gram, rows).double() - exact[label] for label, gram in grams.items()])
    if all(len(rows) == len(gram) for gram in grams.values()):
        return dict(zip(grams, torch.linalg.matrix_norm(error).tolist(), strict=True))
    diagonal = torch.stack([gram.diagonal().double() for gram in grams.values()])
    seen = diagonal.new_tensor([differences[label] for label in grams]) * diagonal.sum(dim=1)
    scaled_up = _scaled_up(grams, diagonal, rows, torch.stack([exact[label] for label in grams]), error)
    return dict(zip(grams, (MARGIN * torch.maximum(scaled_up, seen)).tolist(), strict=True))


def _scaled_up(
    grams: Mapping[str, AnyGram], diagonal: Tensor, rows: Tensor, exact: Tensor, error: Tensor
) -> Float[Tensor, " l"]:
    """‖E‖_F of each Gram, as its submatrix shows it."""
    sizes = torch.maximum(diagonal[:, rows], exact.diagonal(dim1=1, dim2=2))
    own = sizes.square().sum(dim=1)
    own_error = error.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    norm = torch.stack([squared_norm(gram) for gram in grams.values()])
    all_pairs = diagonal.sum(dim=1).square() - diagonal.square().sum(dim=1)
    scaled = _ratio(own_error, own) * norm
    scaled += _ratio(error.square().sum(dim=(1, 2)) - own_error, sizes.sum(dim=1).square() - own) * all_pairs
    return scaled.clamp(min=0).sqrt()


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under, 0.0)


def _formed(
    work: Workload, coordinates: Coordinates, labels: Mapping[str, str] | None, together: int
) -> dict[str, Tensor]:
    """The Grams of all rows, by backward passes of the sequences that they are of, so many together."""
    rows: list[dict[str, Tensor]] = []
    for group in neighbours(work.tokens.sequence.unique_consecutive().tolist(), work.sequences, together):
        leaves, run = work.fn.ordinary_call(work.params, list(work.params))
        batch = work.sequences.joined(group)
        with torch.enable_grad():
            losses = work.loss.values(run(batch), batch)
        here = torch.isin(work.tokens.sequence, work.tokens.sequence.new_tensor(group)).nonzero().squeeze(-1)
        place = torch.searchsorted(work.tokens.sequence.new_tensor(group), work.tokens.sequence[here])
        entry = place * losses.shape[1] + work.tokens.entry[here]
        cotangents = one_hot(entry, losses.flatten()).reshape(len(here), *losses.shape)
        rows.append({n: g.detach().reshape(len(g), -1) for n, g in _pulled(losses, leaves, cotangents).items()})
    parts: dict[str, list[Tensor]] = {}
    for name in work.params:
        found = [row.pop(name) for row in rows]
        gradients = found[0] if len(found) == 1 else torch.cat(found)
        if name in coordinates.index:
            gradients = gradients[:, coordinates.index[name].to(gradients.device)] * coordinates.weight[name]
        parts.setdefault(name if labels is None else labels[name], []).append(gradients)
    return {label: gram_of(torch.cat(parts.pop(label), dim=1)) for label in list(parts)}


def _pulled(losses: Tensor, leaves: Params, cotangents: Tensor) -> dict[str, Tensor]:
    """All rows at once, or one by one where a function of the model cannot be batched."""
    try:
        return gradients_by(leaves, pulled_back([losses], list(leaves.values()), [cotangents]), len(cotangents))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        each = [pulled_back([losses], list(leaves.values()), [one[None]]) for one in cotangents]
        found = [gradients_by(leaves, one, 1) for one in each]
        return {name: torch.cat([row[name] for row in found]) for name in leaves}


def _widened(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
