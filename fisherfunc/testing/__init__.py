"""For whoever tests code on Fisher spectra: Hypothesis strategies, laws as data, checks of parts, and mutants.

Structure (sizes, kinds, holes) is drawn by Hypothesis, so that it shrinks; numbers come from a drawn seed, so
that it is fast. Needs the extra `test`.
"""

try:
    import hypothesis  # noqa: F401 (only to say what is missing)
except ImportError as error:
    raise ImportError('fisherfunc.testing needs Hypothesis: pip install "fisherfunc[test]"') from error

from fisherfunc.testing.coverage import Coverage, clustered_grams, coverage
from fisherfunc.testing.gradient_laws import (
    LOSS_LAWS,
    ROW_LAWS,
    RULE_LAWS,
    check_loss,
    check_partition,
    check_representation,
    class_outputs,
    loop_of_backward_passes,
    parameter_names,
    token_outputs,
    value_outputs,
)
from fisherfunc.testing.gradients import (
    LabelTable,
    gradient_matrices,
    gradient_trees,
    partitions,
    prescribed_spectra,
)
from fisherfunc.testing.law import Failure, Law, Report
from fisherfunc.testing.models import TinyModel, classifiers, language_models, regressors, tiny_models
from fisherfunc.testing.modules import with_weights
from fisherfunc.testing.mutants import Mutant, mutants
from fisherfunc.testing.spectral_laws import (
    KERNEL_LAWS,
    METRIC_LAWS,
    OPERATOR_LAWS,
    check_kernel,
    check_metric,
    check_operator,
    spectra,
    spectrum_function,
    vectors,
)

laws = (*KERNEL_LAWS, *METRIC_LAWS, *LOSS_LAWS, *ROW_LAWS, *RULE_LAWS, *OPERATOR_LAWS)
"""Every law, as data: name, statement, tolerance, what it applies to, examples, and how far an example is off."""

__all__ = [
    "Coverage",
    "Failure",
    "LabelTable",
    "Law",
    "Mutant",
    "Report",
    "TinyModel",
    "check_kernel",
    "check_loss",
    "check_metric",
    "check_operator",
    "check_partition",
    "check_representation",
    "class_outputs",
    "classifiers",
    "clustered_grams",
    "coverage",
    "gradient_matrices",
    "gradient_trees",
    "language_models",
    "laws",
    "loop_of_backward_passes",
    "mutants",
    "parameter_names",
    "partitions",
    "prescribed_spectra",
    "regressors",
    "spectra",
    "spectrum_function",
    "tiny_models",
    "token_outputs",
    "value_outputs",
    "vectors",
    "with_weights",
]
