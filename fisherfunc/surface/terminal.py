"""What commands print on, and who else is kept from printing."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisherfunc.surface.visible import visible

WIDTH_OF_A_FILE = 120
NARROWEST = 30
"""A label of a block and its largest eigenvalue need as many places."""
_TALKATIVE = ("transformers", "huggingface_hub", "peft", "accelerate", "matplotlib", "torch", "py.warnings")


def console() -> Any:
    """Return a rich console: in a file or a pipe lines of 120 columns, in a terminal those that it has, at least 30.

    Raises:
        ImportError: If rich is not installed.
    """
    from rich.console import Console

    terminal = Console()
    if not terminal.is_terminal:
        return Console(width=WIDTH_OF_A_FILE)
    return Console(width=max(terminal.width, NARROWEST))


def written(paths: Sequence[Path], folder: str | os.PathLike[str]) -> str:
    """Return the line that says which files were written."""
    return visible(f"wrote {', '.join(path.name for path in paths)} into {folder}")


def hush() -> None:
    """Keep the libraries from printing bars, advice and warnings: what matters is raised.

    Warnings that the user asked for (python -W, PYTHONWARNINGS) are left as they are.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if "transformers" in sys.modules:
        of_transformers = sys.modules["transformers"].utils.logging
        of_transformers.set_verbosity_error()
        of_transformers.disable_progress_bar()
