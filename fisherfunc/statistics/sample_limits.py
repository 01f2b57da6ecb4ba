"""What a sample can show of a spectrum at all: its rank ceiling, its resolution, and what the number of rows sets."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fisherfunc.linalg.metrics import effective_rank, numerical_rank, trace
from fisherfunc.linalg.spectrum import Spectrum

NEAR, WITHIN = 1 / 3, 0.1


@dataclass(frozen=True, kw_only=True)
class SampleLimits:
    """What the number of rows, the number of parameters and the arithmetic allow a spectrum to show.

    Attributes:
        rank_ceiling: No more eigenvalues than this can be nonzero.
        resolution: Eigenvalues below this are not told from zero.
        set_by_sample: The metrics that the number of rows sets more than the model does.
        warnings: A sentence for each of these.
    """

    rank_ceiling: int
    resolution: float
    set_by_sample: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def sample_limits(spectrum: Spectrum, *, centered: bool = False, squared_norm: float | None = None) -> SampleLimits:
    """The limits of one spectrum: of a block, or of the full matrix; not of a union of blocks.

    The ceiling is min(N, P), or min(N − 1, P) of centred rows. Where N < P, these metrics say more of N than of the
    model:

        numerical_rank, smallest, condition_number: where the numerical rank is the ceiling
        effective_rank, participation_ratio: where ‖F̂‖² of these rows is more than 1.1 times that of the population, as
            far as that is known; else where the effective rank is above a third of the ceiling

    Of r equal population eigenvalues, the kindest case, N ≥ r rows show an effective rank exp(−r/2N) r: at a third of N
    it is a fifth too small. Where the spectrum falls slowly, or few rows carry most of the norm, it is too small by far
    more, and at a smaller share of N: without the population's ‖F‖² no warning does not say that there is nothing to
    warn of. With it, the participation ratio of these rows is too small by just that factor.

    Args:
        spectrum: Of min(N, P) eigenvalues, or of fewer where it is approximate.
        centered: Whether the mean row was subtracted.
        squared_norm: ‖F‖² of the population (`ff.population.squared_norm`), where it is known.

    Example:
        >>> import fisherfunc as ff
        >>> import torch
        >>> rows = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
        >>> limits = sample_limits(ff.spectrum_of_gradients({"weight": rows}).full)
        >>> limits.rank_ceiling, limits.set_by_sample[:2]
        (50, ('numerical_rank', 'smallest'))
    """
    num_rows = _num_rows(spectrum)
    params = math.inf if spectrum.num_params is None else spectrum.num_params
    ceiling = int(min(num_rows - centered, params))
    warnings = _warnings(spectrum, ceiling, squared_norm) if ceiling < params and float(trace(spectrum)) > 0 else {}
    return SampleLimits(
        rank_ceiling=ceiling,
        resolution=spectrum.resolution.item(),
        set_by_sample=tuple(name for names in warnings for name in names),
        warnings=tuple(warnings.values()),
    )


def _num_rows(spectrum: Spectrum) -> int:
    """A unit may have several rows; an exact spectrum has an eigenvalue for each, where these are fewer than P."""
    count = len(spectrum.eigenvalues)
    if not spectrum.exact:
        return spectrum.num_units
    return count if spectrum.num_params is None or count < spectrum.num_params else max(count, spectrum.num_units)


def _warnings(spectrum: Spectrum, ceiling: int, squared_norm: float | None) -> dict[tuple[str, ...], str]:
    rank, effective = int(numerical_rank(spectrum)), effective_rank(spectrum).item()
    found: dict[tuple[str, ...], str] = {}
    if rank >= ceiling:
        found["numerical_rank", "smallest", "condition_number"] = (
            f"the numerical rank {rank} is all that the rows allow, {ceiling}: their number sets it, the smallest "
            "eigenvalue and the condition number"
        )
    if squared_norm is not None:
        own = float(spectrum.eigenvalues.square().sum())
        if own > (1 + WITHIN) * squared_norm:
            times = f"{own / squared_norm:.3g} times" if squared_norm > 0 else "far more than"
            found["effective_rank", "participation_ratio"] = (
                f"‖F‖² of these rows is {times} that of the population, as each row counts with itself: with more rows "
                "both would be larger"
            )
    elif effective > NEAR * ceiling:
        found["effective_rank", "participation_ratio"] = (
            f"the effective rank {effective:.1f} is above a third of the {ceiling} that the rows allow: "
            "it would be larger with more rows"
        )
    return found
