"""For the documentation site: read the section "Example:" of docstrings as doctests, as Griffe does "Examples:"."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section in what the site is made from; the sources stay as they are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """See each object that has been loaded."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
