"""The versions of what a result depends on."""

import platform
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """`{"fisherfunc", "torch", "python"}` → version."""
    return {
        "fisherfunc": metadata.version("fisherfunc"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
