"""Quantiles of Student's t, which the standard library does not have."""

import math

_STEPS = 80


def student_quantile(probability: float, degrees: int) -> float:
    """The t with P(T ≤ t) = `probability`, by bisection.

    Args:
        probability: Between 0 and 1.
        degrees: Degrees of freedom, from 1.

    Example:
        >>> round(student_quantile(0.975, 9), 4), round(student_quantile(0.05, 1), 4)
        (2.2622, -6.3138)
    """
    if probability < 0.5:
        return -student_quantile(1 - probability, degrees)
    low, high = 0.0, math.pi / 2  # of the angle arctan(t/√degrees)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + _central(middle, degrees)) / 2 < probability else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _central(angle: float, degrees: int) -> float:
    """P(|T| ≤ √degrees tan(angle)): the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    if degrees == 1:
        total = 0.0
    for step in range(2 + odd, degrees, 2):
        term *= math.cos(angle) ** 2 * (step - 1) / step
        total += term
    inner = math.sin(angle) * total
    return (angle + inner) * 2 / math.pi if odd else inner
