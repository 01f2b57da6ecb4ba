"""The versions of what a result depends on."""

import platform
import sys
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """`{"fisherfunc", "torch", "python"}` → version, and that of Transformers where it is in use."""
    models = {"transformers": metadata.version("transformers")} if sys.modules.get("transformers") else {}
    return {
        **models,
        "fisherfunc": metadata.version("fisherfunc"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
