"""The statistics layer: how sure a spectrum is, what its sample can show, and how its blocks hang together.

Pure functions of `TokenGrams` and `Spectrum`; no model, and no further pass.
"""

from fisherfunc.statistics.coupling import BlockCoupling, block_coupling, block_diagonal_error
from fisherfunc.statistics.density import (
    DimensionCurve,
    SpectralDensity,
    effective_dimension_curve,
    spectral_density,
)
from fisherfunc.statistics.noise import GradientNoise, gradient_noise_scale, gradient_norms, mean_gradient_norm
from fisherfunc.statistics.resampling.bootstrap import bootstrap
from fisherfunc.statistics.resampling.interval import Interval, Intervals
from fisherfunc.statistics.resampling.jackknife import jackknife
from fisherfunc.statistics.sample_limits import SampleLimits, sample_limits
from fisherfunc.statistics.stability import Halves, SplitHalves, split_halves
from fisherfunc.statistics.tail import TailExponent, tail_exponent

__all__ = [
    "BlockCoupling",
    "DimensionCurve",
    "GradientNoise",
    "Halves",
    "Interval",
    "Intervals",
    "SampleLimits",
    "SpectralDensity",
    "SplitHalves",
    "TailExponent",
    "block_coupling",
    "block_diagonal_error",
    "bootstrap",
    "effective_dimension_curve",
    "gradient_noise_scale",
    "gradient_norms",
    "jackknife",
    "mean_gradient_norm",
    "sample_limits",
    "spectral_density",
    "split_halves",
    "tail_exponent",
]
