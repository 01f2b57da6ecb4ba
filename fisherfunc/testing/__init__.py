"""Hypothesis strategies for whoever tests code on Fisher spectra: gradients, partitions, tiny models.

Structure (sizes, kinds, holes) is drawn by Hypothesis, so that it shrinks; numbers come from a drawn seed, so
that it is fast. Needs the extra `test`.
"""

try:
    import hypothesis  # noqa: F401 (only to say what is missing)
except ImportError as error:
    raise ImportError('fisherfunc.testing needs Hypothesis: pip install "fisherfunc[test]"') from error

from fisherfunc.testing.coverage import Coverage, clustered_grams, coverage
from fisherfunc.testing.gradients import (
    LabelTable,
    gradient_matrices,
    gradient_trees,
    partitions,
    prescribed_spectra,
)
from fisherfunc.testing.models import TinyModel, classifiers, language_models, regressors, tiny_models

__all__ = [
    "Coverage",
    "LabelTable",
    "TinyModel",
    "classifiers",
    "clustered_grams",
    "coverage",
    "gradient_matrices",
    "gradient_trees",
    "language_models",
    "partitions",
    "prescribed_spectra",
    "regressors",
    "tiny_models",
]
