"""The leading eigenvalues of F without any Gram: the operator, Lanczos over its rows, and estimates of all the rest."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fisherfunc.gradients.checkpoint import Checkpoint, opened
from fisherfunc.gradients.dense.norms import gradient_norms
from fisherfunc.gradients.losses import TokenLoss
from fisherfunc.gradients.rows.targets import Targets
from fisherfunc.linalg import metrics
from fisherfunc.linalg.kernels import lanczos, lanczos_quadrature
from fisherfunc.linalg.krylov.krylov import Step
from fisherfunc.linalg.krylov.lanczos import LeadingEigenvalues
from fisherfunc.linalg.krylov.quadrature import SpectralQuadrature
from fisherfunc.models.functionalize import Selection, functionalize
from fisherfunc.operators.fisher import fisher
from fisherfunc.pipeline.fisher import token_loss
from fisherfunc.pipeline.inputs import inputs_of
from fisherfunc.pipeline.solve import NORMALIZATION
from fisherfunc.records.axes import Batch, Progress
from fisherfunc.records.provenance import Provenance, Traced
from fisherfunc.records.record import record
from fisherfunc.runtime.precision import full_precision

ESTIMATES = ("trace", "effective_rank", "participation_ratio")
PARTS_OF_LAMBDA_MAX = (1e-1, 1e-2, 1e-3)
"""The damping γ of the effective dimensions and determinants that are shown, over λ_max."""


@record(static=("provenance", "rest"))
class LeadingSpectrum(Traced):
    """The leading eigenvalues of F, certified, and estimates of sums over all of them.

    Attributes:
        full: The leading eigenvalues, with how far off each can be.
        rest: Sums over the whole spectrum by probes; None where none were asked for.
        provenance: What was computed and how; `exact`, `certified`, `estimated` and `not_certified` name what is which.
    """

    full: LeadingEigenvalues
    rest: SpectralQuadrature | None
    provenance: Provenance

    def to_dict(self) -> dict[str, Any]:
        """Everything but the eigenvalues as plain Python values that survive JSON; what is undefined is None.

        Returns:
            `{"metadata", "per_block": {}, "global": None, "full": the certified metrics and the bound of each
            eigenvalue, "estimates": {name: value, quadrature_error, standard_error, low, high}}`.
        """
        found = self.full
        certified = {name: metrics.SUMMARY[name](found).item() for name in ("largest", "second", "gap")}
        return {
            "metadata": self.metadata,
            "per_block": {},
            "global": None,
            "full": {
                "num_tokens": found.num_tokens,
                "num_params": found.num_params,
                **{name: value if value == value else None for name, value in certified.items()},
                "num_leading": len(found.eigenvalues),
                "residuals": found.residuals.tolist(),
                "bounds": found.bounds.tolist(),
                "round_off": found.round_off.item(),
                "missed": None if bool(found.missed.isnan()) else found.missed.item(),
                "complete": found.complete,
                "resolution": found.resolution.item(),
                "negative_part": found.negative_part.item(),
                "num_steps": found.num_steps,
                "num_products": found.num_products,
                "solver": found.solver,
                "fallback": found.fallback,
                "exact": False,
            },
            "estimates": self._estimates(),
        }

    def _estimates(self) -> dict[str, Any]:
        if self.rest is None:
            return {}
        shown: dict[str, Any] = {name: getattr(self.rest, name)().to_dict() for name in ESTIMATES}
        largest = float(self.full.eigenvalues[0])
        for name in ("effective_dimension", "log_det") if largest > 0 else ():
            shown[name] = [
                {"gamma": part * largest, **getattr(self.rest, name)(part * largest).to_dict()}
                for part in PARTS_OF_LAMBDA_MAX
            ]
        return shown


@full_precision()
@torch.inference_mode(mode=False)
def leading_spectrum(
    model: nn.Module,
    batch: Batch,
    *,
    loss: TokenLoss | Callable[[Any, Batch], Tensor] | None = None,
    targets: Targets | None = None,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    parameters: Selection = "trainable",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    num_leading: int = 20,
    tolerance: float = 1e-2,
    num_probes: int = 4,
    probe_steps: int = 8,
    exact_trace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> LeadingSpectrum:
    """Compute the leading eigenvalues of F by Lanczos, certified, and estimate sums over the others by probes.

    No Gram is made: memory is some numbers a token and step, and that of a gradient. Cost: about six forward passes of
    all tokens a product; 3 to 4 products an eigenvalue at a tolerance of 1e-2, and `num_probes` · `probe_steps`.

    Args:
        model: Any module; it is left as it was. Evaluated in evaluation mode.
        batch: As of `fisher_spectrum`.
        loss: As of `fisher_spectrum`; inferred where None.
        targets: As of `fisher_spectrum`.
        unit: "token" or "sequence".
        num_tokens: At most this many tokens, picked by seed.
        seed: Of whatever is picked, of the first vector and of the probes.
        parameters: As of `fisher_spectrum`.
        dtype: What the passes run in; that of the model where None.
        device: Where they run; where the model lies if None.
        num_leading: How many eigenvalues.
        tolerance: Of their residuals, relative.
        num_probes: How many random vectors estimate the rest; none where 0.
        probe_steps: Lanczos steps from each.
        exact_trace: Whether to compute tr F exactly, at one backward pass a token more (`ff.gradient_norms`).
        checkpoint: A folder in which each product is kept: the same call goes on from there, to the same bits.
        progress: Called as `progress(done, total)`, in products.

    Raises:
        ValueError: If an option or the batch is unusable, a loss or a product is not finite, or the folder is of
            another run; it says what.
        OSError: If the folder cannot be written.
    """
    begin = perf_counter()
    solve = lanczos(num_leading=num_leading, tolerance=tolerance, seed=seed)
    if num_probes < 0:
        raise ValueError(f"num_probes expected at least 0, got num_probes={num_probes}")
    estimate = lanczos_quadrature(num_probes=num_probes, num_steps=probe_steps, seed=seed + 1) if num_probes else None
    fn = functionalize(model, parameters=parameters).to(dtype=dtype, device=device)
    data = inputs_of(fn, batch, num_tokens, lambda first: token_loss(loss, model, first))
    batch = data.batches
    token = token_loss(loss, model, batch)
    asked: dict[str, Any] = {"targets": targets, "unit": unit, "num_tokens": num_tokens, "seed": seed}
    operator = fisher(fn, fn.params, batch, token, **asked)
    kept = opened(checkpoint, lambda: {**operator.fingerprint(), "seed": str(seed), "seed of probes": str(seed + 1)})
    kept.begin("products")
    if exact_trace:
        trace = float(gradient_norms(fn, fn.params, batch, token, **asked).sum()) / operator.num_tokens
        operator = replace(operator, trace=trace)
    steps = list(_steps(kept, "leading"))
    writer = _Writer(kept, len(steps))
    full = solve(operator, steps=steps, keep=writer.keep, progress=_part(progress, num_probes * probe_steps))
    rest = None
    if estimate is not None:
        known = {probe: list(_steps(kept, f"probe-{probe}")) for probe in range(num_probes)}
        writers = {probe: _Writer(kept, len(known[probe]), f"probe-{probe}") for probe in known}
        report = _part(progress, full.num_products, done=full.num_products)
        rest = estimate(operator, steps=known, keep=lambda probe, step: writers[probe].keep(step), progress=report)
    provenance = replace(
        _with_certificates(operator.provenance, full, rest, exact_trace),
        method="lanczos",
        model=fn.name,
        mode="evaluation",
        num_frozen_params=sum(p.numel() for p in fn.frozen.values()),
        normalization=NORMALIZATION,
        centered=False,
        data=data.facts,
        approximations=[f"the {len(full.eigenvalues)} leading eigenvalues alone, by {full.solver}"],
        num_products=full.num_products + (0 if rest is None else rest.num_products),
        resumed_products=len(steps),
        wall_time_s=perf_counter() - begin,
    )
    return LeadingSpectrum(full=full, rest=rest, provenance=provenance)


def _with_certificates(
    provenance: Provenance, full: LeadingEigenvalues, rest: SpectralQuadrature | None, exact_trace: bool
) -> Provenance:
    """Say what is exact, what is certified and by what, what is estimated, and what is not certified."""
    certified = [
        "full.bounds: an eigenvalue of F lies within each of them of the one given, the measured round-off included",
        "eigenvalues.full: the k-th largest eigenvalue of F is no smaller than the k-th given, less full.round_off",
    ]
    lacking = [] if full.complete else ["that no eigenvalue between those given was missed, and multiplicities"]
    if full.complete:
        certified.append("full.complete: these are the largest eigenvalues")
    estimated = [] if rest is None else ["estimates: by random probes, with the error of quadrature and of probes"]
    return replace(
        provenance,
        exact=["estimates.trace"] if exact_trace and rest is not None else [],
        certified=certified,
        estimated=estimated,
        not_certified=lacking,
    )


def _part(progress: Progress | None, others: int, *, done: int = 0) -> Progress | None:
    return None if progress is None else lambda now, total: progress(done + now, total + others)


def _steps(kept: Checkpoint, name: str) -> Iterator[Step]:
    """The steps that are kept, up to the first that is missing or damaged."""
    number = 0
    while (found := kept.read(f"{name}-{number:05d}")) is not None:
        yield Step(column=found[0]["column"], vector=found[0]["vector"])
        number += 1


class _Writer:
    """Keeps steps under a name, one file each."""

    def __init__(self, kept: Checkpoint, number: int, name: str = "leading") -> None:
        self._kept, self._number, self._name = kept, number, name

    def keep(self, step: Step) -> None:
        tensors = {"column": step.column, "vector": step.vector}
        self._kept.write(f"{self._name}-{self._number:05d}", tensors, {})
        self._number += 1
