"""A GPU's way to divide a pass, on a CPU and at the scale of tiny models: results do not depend on it."""

from dataclasses import replace

from fisherfunc.runtime.grain import GPU

TINY = replace(GPU, features=4, middle_bytes=2**11, rows=5)
"""Several blocks of features, groups of strips and tiles."""
