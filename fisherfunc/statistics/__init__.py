"""The statistics layer: how sure a spectrum is, what its sample can show, and how its blocks hang together.

Pure functions of `TokenGrams` and `Spectrum`; no model, and no further pass.
"""

from fisherfunc.statistics.bootstrap import bootstrap
from fisherfunc.statistics.interval import Interval, Intervals
from fisherfunc.statistics.jackknife import jackknife
from fisherfunc.statistics.sample_limits import SampleLimits, sample_limits

__all__ = ["Interval", "Intervals", "SampleLimits", "bootstrap", "jackknife", "sample_limits"]
