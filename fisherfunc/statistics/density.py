"""Curves of a spectrum: how many eigenvalues there are a decade, and how many exceed a damping."""

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.records.record import record


@record(static=("num_below",))
class SpectralDensity:
    """Eigenvalues a decade: a histogram on a logarithmic axis whose area is the number of eigenvalues in it.

    Attributes:
        edges: Of the bins, ascending and evenly spaced on the logarithmic axis.
        density: The number in each bin over its width in decades.
        num_below: How many eigenvalues are not resolved, and left out.
    """

    edges: Float[Tensor, " e"]
    density: Float[Tensor, " k"]
    num_below: int

    @property
    def area(self) -> float:
        """Σ density · width in decades: the number of eigenvalues in the histogram."""
        return float((self.density * self.edges.log10().diff()).sum())


@record()
class DimensionCurve:
    """The effective dimension against the damping.

    Attributes:
        gamma: The dampings, ascending.
        dimension: Σ λ/(λ + γ) at each.
    """

    gamma: Float[Tensor, " k"]
    dimension: Float[Tensor, " k"]


def spectral_density(spectrum: Spectrum, *, num_bins: int = 40) -> SpectralDensity:
    """The histogram of the resolved eigenvalues on a logarithmic axis, from the smallest of them to λ_1.

    Args:
        spectrum: One spectrum.
        num_bins: How many bins of equal width on that axis.

    Raises:
        ValueError: If no eigenvalue is resolved, or there is no bin.

    Example:
        >>> import fisherfunc as ff
        >>> rows = torch.diag(torch.tensor([1.0, 3.0, 100.0])) * 3**0.5  # eigenvalues 1, 9 and 10,000
        >>> spectral_density(ff.spectrum_of_gradients({"weight": rows}).full, num_bins=2).density
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if num_bins < 1:
        raise ValueError(f"num_bins expected at least 1, got num_bins={num_bins!r}")
    values = resolved(spectrum)
    ends = values.log10()
    low, high = ends.min().item(), ends.max().item()
    if high - low < 1e-6:  # one value, or equal ones: a bin of some width around it
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, num_bins + 1, dtype=values.dtype, device=values.device)
    bins = torch.bucketize(ends, edges[1:-1].contiguous(), right=True)
    counts = torch.bincount(bins, minlength=num_bins)
    return SpectralDensity(
        edges=10**edges,
        density=counts / edges.diff(),
        num_below=len(spectrum.eigenvalues) - len(values),
    )


def effective_dimension_curve(
    spectrum: Spectrum, gamma: Float[Tensor, " k"] | None = None, *, num_points: int = 64
) -> DimensionCurve:
    """Σ λ/(λ + γ) over γ: `ff.metrics.effective_dimension` for many dampings at once.

    Args:
        spectrum: One spectrum.
        gamma: Dampings; from the smallest resolved eigenvalue to λ_1, evenly spaced on a logarithmic axis, where None.
        num_points: How many, where `gamma` is None.

    Raises:
        ValueError: If a damping is not positive, or none is given and no eigenvalue is resolved.
    """
    if gamma is None:
        ends = resolved(spectrum).log10()
        gamma = torch.logspace(ends.min().item(), ends.max().item(), num_points, dtype=ends.dtype, device=ends.device)
    if not bool((gamma > 0).all()):
        raise ValueError(f"gamma expected positive dampings, got {gamma.min().item()} among them")
    values = spectrum.eigenvalues
    return DimensionCurve(gamma=gamma, dimension=(values / (values + gamma[:, None])).sum(dim=-1))


def resolved(spectrum: Spectrum) -> Float[Tensor, " k"]:
    """The eigenvalues above the resolution.

    Raises:
        ValueError: If there is none.
    """
    values = spectrum.eigenvalues[spectrum.eigenvalues > spectrum.resolution]
    if not len(values):
        raise ValueError(
            f"no eigenvalue of {len(spectrum.eigenvalues)} is above the resolution {spectrum.resolution.item():.1e}: "
            "there is nothing to show on a logarithmic axis; check that the gradients are not zero"
        )
    return values
