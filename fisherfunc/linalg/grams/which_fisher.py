"""Which Fisher the rows of G make, in words, and what may be done with the rows of each.

| targets | F = (1/N) Gᵀ G is | rows of a token |
| --- | --- | --- |
| observed | the empirical Fisher | its gradient |
| drawn from the model | the true Fisher, estimated without bias | one a draw, over √draws |
| every class | the true Fisher (Gauss-Newton), exactly | one a class, times √p |
"""

EMPIRICAL = "empirical"
EXACT = "true (exact)"


def monte_carlo(num_draws: int) -> str:
    """The true Fisher from draws.

    Example:
        >>> monte_carlo(1), monte_carlo(4)
        ('true (Monte-Carlo, 1 draw)', 'true (Monte-Carlo, 4 draws)')
    """
    return f"true (Monte-Carlo, {num_draws} draw{'' if num_draws == 1 else 's'})"


def check_center(fisher: str) -> None:
    """Raise where the mean row is not to be subtracted.

    Under the model's own distribution E_y ∇log p(y) = 0, exactly: the gradient covariance is the true Fisher, and the
    mean of draws would only be noise.

    Raises:
        ValueError: If the rows are not of observed targets.
    """
    if fisher != EMPIRICAL:
        raise ValueError(
            f"center is of the empirical Fisher, got rows of the {matrix(fisher)}: the expected gradient under the "
            "model's own distribution is zero exactly, so the true Fisher is its own covariance; leave center out"
        )


def check_sums(fisher: str) -> None:
    """Raise where the rows of a sequence's tokens are not to be summed.

    With independent targets the mixed terms of different tokens vanish in expectation: the true Fisher of a sequence
    is Σ of those of its tokens, which a sum of rows √p_c ∇log p_c over tokens is not.

    Raises:
        ValueError: If the rows are of all classes.
    """
    if fisher == EXACT:
        raise ValueError(
            "unit='sequence' expected observed or sampled targets, got all_classes: with independent targets the exact "
            "true Fisher of a sequence is the sum of those of its tokens, so it is that of unit='token' times tokens "
            "over sequences; take unit='token', or targets=ff.targets.sampled(...)"
        )


def matrix(fisher: str) -> str:
    """What the matrix is called.

    Example:
        >>> matrix("empirical"), matrix("true (exact)")
        ('empirical Fisher', 'true Fisher (exact)')
    """
    kind, _, how = fisher.partition(" ")
    return f"{kind} Fisher {how}".rstrip()
