"""What the libraries that read a model raise, in our words: what was read, from where, what was wrong, what to do."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError, safe_open

_LONGEST_REASON = 200


@contextmanager
def reading(what: str, name: str) -> Iterator[None]:
    """Say what was read, and from where, in any failure of the libraries that read it."""
    try:
        yield
    except ImportError as error:
        reason = f"{brief(error)}; {brief(_root(error))}" if _root(error) is not error else brief(error)
        raise ImportError(f"reading the {what} of {name} failed on an import: {reason}") from error
    except Exception as error:  # safetensors, pickle and the hub raise types that share no other base
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} needs code of its own (the auto_map of its {what}), and fisherfunc runs no code that comes "
                "with a model; load it yourself with trust_remote_code=True and pass it to fisherfunc.fisher_spectrum, "
                "or give a version of it that Transformers has the code of"
            ) from error
        if Path(name).expanduser().exists():
            raise ValueError(_unreadable(what, Path(name).expanduser(), error)) from error
        raise OSError(f"no folder is called {name!r}, and the hub did not give its {what}: {brief(error)}") from error


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _unreadable(what: str, folder: Path, error: Exception) -> str:
    damaged = [reason for path in sorted(folder.glob("*.safetensors")) if (reason := _damage(path))]
    reason = "; ".join(damaged) if what == "weights" and damaged else brief(error)
    return (
        f"the {what} in {folder} cannot be read ({reason}); restore the files, or install the Transformers "
        "that wrote them"
    )


def _damage(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"{path.name} is corrupt: {error}"


def brief(error: BaseException) -> str:
    """Return the type and the beginning of the message of an error, on one line."""
    if isinstance(error, UnpicklingError):  # its own text advises to load the file unsafely
        return "UnpicklingError: the .bin file is corrupt, or holds more than tensors"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {textwrap.shorten(message, _LONGEST_REASON, placeholder=' …')}"
