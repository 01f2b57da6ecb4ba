"""Directions in parameter space: eigenvectors of F, products with F and its damped inverse, subspaces, tokens."""

from fisherfunc.gradients.directions.operators import damped_inverse, fisher_vector_product
from fisherfunc.gradients.directions.token_table import LeadingToken, leading_tokens
from fisherfunc.gradients.directions.vectors import Eigenvectors, eigenpairs, eigenvectors
from fisherfunc.linalg.grams.eigenpairs import Eigenpairs
from fisherfunc.linalg.subspaces import Overlap, Projection, project, subspace_overlap

__all__ = [
    "Eigenpairs",
    "Eigenvectors",
    "LeadingToken",
    "Overlap",
    "Projection",
    "damped_inverse",
    "eigenpairs",
    "eigenvectors",
    "fisher_vector_product",
    "leading_tokens",
    "project",
    "subspace_overlap",
]
