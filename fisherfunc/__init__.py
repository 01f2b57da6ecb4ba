"""fisherfunc: the exact spectrum of the per-token Fisher information of neural networks, in functional PyTorch.

    import fisherfunc as ff
    result = ff.fisher_spectrum(model, batch)
    result.full.eigenvalues

Layers, each importing only those before it: records, runtime, distributed, linalg, partitioning, statistics,
population, gradients, operators, models, pipeline, surface.

What a name stands for is imported when the name is first used: the command line has to answer an interrupt from its
first moment on, and torch takes seconds; `ff.testing` needs Hypothesis, which nothing else does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisherfunc import distributed, operators, population, statistics
    from fisherfunc.gradients import directions, losses
    from fisherfunc.gradients.autodiff.model_function import ModelFunction
    from fisherfunc.gradients.dense.norms import gradient_norms
    from fisherfunc.gradients.dense.route import per_token_gradients
    from fisherfunc.gradients.grams import token_grams
    from fisherfunc.gradients.planning.run_plan import RunPlan
    from fisherfunc.gradients.rows import targets, tokens
    from fisherfunc.linalg import gram, kernels, metrics
    from fisherfunc.linalg.gram import Gram
    from fisherfunc.linalg.grams.token_grams import TokenGrams, Tokens
    from fisherfunc.linalg.spectrum import Spectrum
    from fisherfunc.models.functionalize import functionalize
    from fisherfunc.models.heads import divide_heads
    from fisherfunc.partitioning import by_head, by_layer, by_module, by_parameter, partition, whole
    from fisherfunc.pipeline.comparing.compare import compare
    from fisherfunc.pipeline.comparing.comparison import Comparison
    from fisherfunc.pipeline.eigenvectors import fisher_eigenvectors
    from fisherfunc.pipeline.fisher import fisher_spectrum
    from fisherfunc.pipeline.methods import sketches
    from fisherfunc.pipeline.needed import tokens_needed
    from fisherfunc.pipeline.plan import plan
    from fisherfunc.pipeline.result import FisherSpectrum
    from fisherfunc.pipeline.solve import spectrum_of_gradients, spectrum_of_grams
    from fisherfunc.records.provenance import Provenance
    from fisherfunc.runtime.determinism import deterministic
    from fisherfunc.surface.plots import panels as plots
    from fisherfunc.surface.progress import progress_bar
    from fisherfunc.surface.recorder import SpectrumRecorder
    from fisherfunc.surface.trainer_callback import trainer_callback

__all__ = [
    "Comparison",
    "FisherSpectrum",
    "Gram",
    "ModelFunction",
    "Provenance",
    "RunPlan",
    "Spectrum",
    "SpectrumRecorder",
    "TokenGrams",
    "Tokens",
    "by_head",
    "by_layer",
    "by_module",
    "by_parameter",
    "compare",
    "deterministic",
    "directions",
    "distributed",
    "divide_heads",
    "fisher_eigenvectors",
    "fisher_spectrum",
    "functionalize",
    "gradient_norms",
    "gram",
    "kernels",
    "losses",
    "metrics",
    "operators",
    "partition",
    "per_token_gradients",
    "plan",
    "plots",
    "population",
    "progress_bar",
    "sketches",
    "spectrum_of_gradients",
    "spectrum_of_grams",
    "statistics",
    "targets",
    "token_grams",
    "tokens",
    "tokens_needed",
    "trainer_callback",
    "whole",
]

_MODULES = {
    "directions": "fisherfunc.gradients.directions",
    "distributed": "fisherfunc.distributed",
    "gram": "fisherfunc.linalg.gram",
    "kernels": "fisherfunc.linalg.kernels",
    "losses": "fisherfunc.gradients.losses",
    "metrics": "fisherfunc.linalg.metrics",
    "operators": "fisherfunc.operators",
    "plots": "fisherfunc.surface.plots.panels",
    "population": "fisherfunc.population",
    "sketches": "fisherfunc.pipeline.methods.sketches",
    "statistics": "fisherfunc.statistics",
    "targets": "fisherfunc.gradients.rows.targets",
    "testing": "fisherfunc.testing",
    "tokens": "fisherfunc.gradients.rows.tokens",
}
_LAYERS = ("records", "runtime", "linalg", "partitioning", "gradients", "models", "pipeline", "surface")
_PLACES = {
    "Comparison": "fisherfunc.pipeline.comparing.comparison",
    "FisherSpectrum": "fisherfunc.pipeline.result",
    "Gram": "fisherfunc.linalg.gram",
    "ModelFunction": "fisherfunc.gradients.autodiff.model_function",
    "Provenance": "fisherfunc.records.provenance",
    "RunPlan": "fisherfunc.gradients.planning.run_plan",
    "Spectrum": "fisherfunc.linalg.spectrum",
    "SpectrumRecorder": "fisherfunc.surface.recorder",
    "TokenGrams": "fisherfunc.linalg.grams.token_grams",
    "Tokens": "fisherfunc.linalg.grams.token_grams",
    "by_head": "fisherfunc.partitioning",
    "by_layer": "fisherfunc.partitioning",
    "by_module": "fisherfunc.partitioning",
    "by_parameter": "fisherfunc.partitioning",
    "compare": "fisherfunc.pipeline.comparing.compare",
    "deterministic": "fisherfunc.runtime.determinism",
    "divide_heads": "fisherfunc.models.heads",
    "fisher_eigenvectors": "fisherfunc.pipeline.eigenvectors",
    "fisher_spectrum": "fisherfunc.pipeline.fisher",
    "functionalize": "fisherfunc.models.functionalize",
    "gradient_norms": "fisherfunc.gradients.dense.norms",
    "partition": "fisherfunc.partitioning",
    "per_token_gradients": "fisherfunc.gradients.dense.route",
    "plan": "fisherfunc.pipeline.plan",
    "progress_bar": "fisherfunc.surface.progress",
    "spectrum_of_gradients": "fisherfunc.pipeline.solve",
    "spectrum_of_grams": "fisherfunc.pipeline.solve",
    "token_grams": "fisherfunc.gradients.grams",
    "tokens_needed": "fisherfunc.pipeline.needed",
    "trainer_callback": "fisherfunc.surface.trainer_callback",
    "whole": "fisherfunc.partitioning",
}


def __getattr__(name: str) -> Any:
    """Import what a public name stands for, once."""
    if name in _MODULES or name in _LAYERS:
        value: Any = import_module(_MODULES.get(name, f"fisherfunc.{name}"))
    elif name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module 'fisherfunc' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name what is public, imported or not."""
    return sorted({*globals(), *__all__, "testing"})
