"""fisherfunc: the exact spectrum of the per-token Fisher information of neural networks, in functional PyTorch.

    import fisherfunc as ff
    result = ff.fisher_spectrum(model, batch)
    result.full.eigenvalues

Layers, each importing only those before it: records, linalg, partitioning, statistics, gradients, models, pipeline,
surface.
"""

from importlib import import_module
from types import ModuleType

from fisherfunc import statistics
from fisherfunc.gradients import losses, targets
from fisherfunc.gradients.dense.route import per_token_gradients
from fisherfunc.gradients.grams import token_grams
from fisherfunc.gradients.model_function import ModelFunction
from fisherfunc.gradients.run_plan import RunPlan
from fisherfunc.linalg import kernels, metrics
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.linalg.token_grams import TokenGrams, Tokens
from fisherfunc.models.functionalize import functionalize
from fisherfunc.partitioning import by_layer, by_module, by_parameter, partition, whole
from fisherfunc.pipeline.determinism import deterministic
from fisherfunc.pipeline.fisher import fisher_spectrum
from fisherfunc.pipeline.plan import plan
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.solve import spectrum_of_gradients, spectrum_of_grams

__all__ = [
    "FisherSpectrum",
    "ModelFunction",
    "RunPlan",
    "Spectrum",
    "TokenGrams",
    "Tokens",
    "by_layer",
    "by_module",
    "by_parameter",
    "deterministic",
    "fisher_spectrum",
    "functionalize",
    "kernels",
    "losses",
    "metrics",
    "partition",
    "per_token_gradients",
    "plan",
    "spectrum_of_gradients",
    "spectrum_of_grams",
    "statistics",
    "targets",
    "token_grams",
    "whole",
]


def __getattr__(name: str) -> ModuleType:
    """`ff.testing` on first use: it needs Hypothesis, which the package itself does not."""
    if name == "testing":
        return import_module("fisherfunc.testing")
    raise AttributeError(f"module 'fisherfunc' has no attribute {name!r}")
