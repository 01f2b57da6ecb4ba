"""The population layer: what a sample's Grams say of the population that its sequences were drawn from.

Pure functions of `TokenGrams`; no model, and no further pass. F is here the expectation, the Fisher of all tokens that
could have been drawn, not that of these N: its leading eigenvalue, participation ratio and block structure are other
numbers, and most of the sample's tell of N alone. Where targets are `sampled`, F is the true Fisher: what is made of
products of distinct sequences, whose draws are independent, has its expectation at one draw a token already.
docs/population.md has the whole.
"""

from fisherfunc.population.dimension import EffectiveDimension, effective_dimension
from fisherfunc.population.estimate import BlockEstimates, Estimate
from fisherfunc.population.leading import LeadingSums, leading_eigenvalue, leading_sums
from fisherfunc.population.moments import moments
from fisherfunc.population.rank import effective_rank
from fisherfunc.population.second_moments import (
    BlockCoupling,
    block_coupling,
    block_diagonal_error,
    participation_ratio,
    squared_norm,
)
from fisherfunc.population.summary import PopulationSummary, summary

__all__ = [
    "BlockCoupling",
    "BlockEstimates",
    "EffectiveDimension",
    "Estimate",
    "LeadingSums",
    "PopulationSummary",
    "block_coupling",
    "block_diagonal_error",
    "effective_dimension",
    "effective_rank",
    "leading_eigenvalue",
    "leading_sums",
    "moments",
    "participation_ratio",
    "squared_norm",
    "summary",
]
