"""What matplotlib's own state holds."""

import sys


def open_figures() -> list[int]:
    """The figures of pyplot, which another test may have left there; none where it was not imported."""
    return sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []
