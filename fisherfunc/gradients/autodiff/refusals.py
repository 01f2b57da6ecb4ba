"""What a user's model may raise, where something else is then tried, or said."""

REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model may raise where it is given a length, a number of sequences, or values, that it is not made for."""
