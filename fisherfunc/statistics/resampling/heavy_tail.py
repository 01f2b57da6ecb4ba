"""Where sequences differ so much in what they contribute to a moment that larger ones are likely unseen.

Axis order: clusters `(s,)`.
"""

from jaxtyping import Float
from torch import Tensor

HEAVY = 1.0
"""The standard deviation of log contributions per token of clusters beyond which the interval of a *moment* fails.
Samples that lack the large contributions show a small one, so that what is printed holds less often than all would. By
simulation (lognormal norms, 8 to 50 clusters, nominal 95 %) intervals held the truth in 93 to 97 % of all samples where
it is typically 0.5 to 0.9, in 91 to 96 % of those that are printed with this bound where most are, and in 81 to 90 %
where it is 1.3 to 2; of windows of the embedded text it is 0.2 to 0.4."""
LEFT_SKEWED, ABOVE = -0.5, 0.9
"""Where the skewness of those logarithms is below the one, and contributions above the mean are above it by less than
the other (the mean logarithm), it is small contributions that spread them, and the interval holds. Sums of few squares,
as of one token per sequence, are such: of χ² of one degree of freedom, at 8, 20 and 50 clusters 44, 64 and 84 % are,
and intervals held in 90 to 95 % (without this, none is printed). Of lognormal ones of deviation 1.5, 18, 12 and 6 %."""


def heavy_moment(
    traces: Float[Tensor, " s"], contributions: Float[Tensor, " s"], sizes: Float[Tensor, " s"], what: str
) -> str | None:
    """Return the warning of a moment of higher order: that of the trace, or of its own contributions.

    Args:
        traces: Contributions to the trace: products of two clusters hide how large one of them is.
        contributions: Those to the moment.
        sizes: T_s.
        what: What the moment is called.
    """
    return heavy_tail(contributions, sizes, what) or heavy_tail(traces, sizes, "the trace")


def heavy_tail(contributions: Float[Tensor, " s"], sizes: Float[Tensor, " s"], what: str) -> str | None:
    """Return the warning that a moment's interval is too short, where clusters differ so much that larger are unseen.

    Args:
        contributions: Of each cluster, to the moment.
        sizes: T_s: that clusters differ by is no matter of what was drawn.
        what: What the moment is called.
    """
    positive = (contributions / sizes)[contributions > 0]
    if len(positive) < 2:
        return None
    if 2 * len(positive) > len(contributions) and _spread_by_small(positive):
        return None
    share = float(contributions.max() / contributions.sum())
    return (
        f"the contributions of sequences to {what} differ so much (the largest has {share:.0%}) that "
        "larger ones are likely where none was drawn: the interval is too short; ratios such as the participation "
        "ratio do not suffer from this"
    )


def _spread_by_small(positive: Float[Tensor, " s"]) -> bool:
    """Whether no contribution is likely to be far larger, as logarithms are spread little, or downwards."""
    logs = positive.log()
    deviation, centred = float(logs.std()), logs - logs.mean()
    if deviation * (1 + len(positive) ** -0.5) <= HEAVY:  # the upper end of what it may be, at about 80 %
        return True
    skewness = float(centred.pow(3).mean() / centred.square().mean() ** 1.5)
    excess = (positive / positive.mean()).log()
    return skewness < LEFT_SKEWED and float(excess[excess > 0].mean()) < ABOVE
