"""The Fisher as a linear operator, over tokens and over parameters: products, without any Gram."""

from fisherfunc.linalg.krylov.lanczos import LeadingEigenvalues
from fisherfunc.linalg.krylov.quadrature import Estimate, SpectralQuadrature
from fisherfunc.linalg.krylov.stored import StoredGram, stored_gram
from fisherfunc.linalg.krylov.token_operator import TokenOperator, gram_operator
from fisherfunc.operators.by_pairs import fisher_gram
from fisherfunc.operators.fisher import FisherOperator, fisher
from fisherfunc.operators.ranks import over_ranks

__all__ = [
    "Estimate",
    "FisherOperator",
    "LeadingEigenvalues",
    "SpectralQuadrature",
    "StoredGram",
    "TokenOperator",
    "fisher",
    "fisher_gram",
    "gram_operator",
    "over_ranks",
    "stored_gram",
]
