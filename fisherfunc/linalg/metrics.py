"""Numbers that describe a spectrum: pure functions of the eigenvalues λ_1 ≥ λ_2 ≥ … of F.

Each takes a `Spectrum` and returns a tensor without the eigenvalue axis; they survive `vmap`. A quantity that
does not exist (the second eigenvalue where P = 1, the condition number of zero) is NaN, in `summary` None.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherfunc.linalg.spectrum import Spectrum

Scalar = Float[Tensor, "*stack"]


def largest(spectrum: Spectrum) -> Scalar:
    """λ_1."""
    return spectrum.eigenvalues[..., 0]


def second(spectrum: Spectrum) -> Scalar:
    """λ_2: exactly 0 where N = 1 < P, NaN where F is 1 × 1."""
    if spectrum.eigenvalues.shape[-1] > 1:
        return spectrum.eigenvalues[..., 1]
    missing = math.nan if spectrum.num_params in (1, None) else 0.0
    return torch.full_like(spectrum.eigenvalues[..., 0], missing)


def smallest(spectrum: Spectrum) -> Scalar:
    """The smallest eigenvalue above the resolution floor; NaN where none is."""
    resolved = _resolved(spectrum)
    infinite = torch.full_like(spectrum.eigenvalues, math.inf)
    least = torch.where(resolved, spectrum.eigenvalues, infinite).amin(dim=-1)
    return torch.where(resolved.any(dim=-1), least, torch.nan)


def gap(spectrum: Spectrum) -> Scalar:
    """The spectral gap λ_1 − λ_2."""
    return largest(spectrum) - second(spectrum)


def relative_gap(spectrum: Spectrum) -> Scalar:
    """(λ_1 − λ_2)/λ_1; NaN for a zero spectrum."""
    return gap(spectrum) / largest(spectrum)


def condition_number(spectrum: Spectrum) -> Scalar:
    """λ_1 over the smallest eigenvalue above the resolution: a lower bound where others lie below it.

    There it is about λ_1 over the resolution, and says more of the arithmetic than of F.
    """
    return largest(spectrum) / smallest(spectrum)


def trace(spectrum: Spectrum) -> Scalar:
    """Σλ = (1/N) Σ_n ‖g_n‖²."""
    return spectrum.eigenvalues.sum(dim=-1)


def effective_rank(spectrum: Spectrum) -> Scalar:
    """exp(H(λ/Σλ)), the exponential of the spectral entropy; 0 for a zero spectrum.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007 (there of singular values; here of the
    eigenvalues of F).
    """
    share = _shares(spectrum)
    entropy = torch.special.entr(share).sum(dim=-1)
    return torch.where(trace(spectrum) > 0, entropy.exp(), 0.0)


def stable_rank(spectrum: Spectrum) -> Scalar:
    """Σλ/λ_1, of G: ‖G‖_F²/‖G‖_2²; 0 for a zero spectrum."""
    return torch.where(trace(spectrum) > 0, trace(spectrum) / largest(spectrum), 0.0)


def participation_ratio(spectrum: Spectrum) -> Scalar:
    """(Σλ)²/Σλ²; 0 for a zero spectrum."""
    share = _shares(spectrum)
    return torch.where(trace(spectrum) > 0, 1.0 / share.square().sum(dim=-1), 0.0)


def numerical_rank(spectrum: Spectrum) -> Int[Tensor, "*stack"]:
    """The number of eigenvalues above the resolution floor."""
    return _resolved(spectrum).sum(dim=-1)


def effective_dimension(spectrum: Spectrum, gamma: float) -> Scalar:
    """Σ λ/(λ + γ), the degrees of freedom of a ridge with damping γ > 0.

    Raises:
        ValueError: If γ is not positive.
    """
    if not gamma > 0:
        raise ValueError(
            f"effective_dimension needs gamma > 0, got gamma={gamma!r}; use numerical_rank for the limit 0"
        )
    return (spectrum.eigenvalues / (spectrum.eigenvalues + gamma)).sum(dim=-1)


SUMMARY = {
    "largest": largest,
    "second": second,
    "smallest": smallest,
    "gap": gap,
    "relative_gap": relative_gap,
    "condition_number": condition_number,
    "trace": trace,
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
    "participation_ratio": participation_ratio,
    "numerical_rank": numerical_rank,
}


def summary(spectrum: Spectrum) -> dict[str, float | int | str | bool | None]:
    """Every metric of one spectrum as plain Python values; one that does not exist is None."""
    values = {name: _plain(metric(spectrum).item()) for name, metric in SUMMARY.items()}
    return {
        "num_tokens": spectrum.num_units,
        "num_params": spectrum.num_params,
        **values,
        "resolution": _plain(spectrum.resolution.item()),
        "negative_part": _plain(spectrum.negative_part.item()),
        "solver": spectrum.solver,
        "fallback": spectrum.fallback,
        "exact": spectrum.exact,
    }


def _plain(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def _resolved(spectrum: Spectrum) -> Tensor:
    return spectrum.eigenvalues > spectrum.resolution[..., None]


def _shares(spectrum: Spectrum) -> Tensor:
    total = trace(spectrum)[..., None]
    return spectrum.eigenvalues / torch.where(total > 0, total, 1.0)
