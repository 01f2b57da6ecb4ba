"""What commands print on, and who else is kept from printing."""

import os
import sys
from typing import Any

WIDTH_OF_A_FILE = 120


def console() -> Any:
    """A rich console; in a file or a pipe, lines of 120 columns.

    Raises:
        ImportError: If rich is not installed.
    """
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH_OF_A_FILE)


def hush() -> None:
    """No bars and no advice from Transformers: what matters is raised."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        logging = sys.modules["transformers"].utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
