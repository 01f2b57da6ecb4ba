"""What a terminal shows of something that rich prints."""

from typing import Any

from rich.console import Console


def shown(renderable: Any, width: int = 120) -> str:
    """The text, without colours, of a terminal so wide."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
