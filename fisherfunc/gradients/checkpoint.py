"""A folder in which a pass keeps what it has done, so that another process can go on where it stopped.

| file | what |
| --- | --- |
| `plan.safetensors` | fingerprint and plan of the pass, in its header |
| `grams-K.safetensors` | the Grams that stage K (a group of parameters, or a slab) added to, as they were after it |
| `cotangents-L-S.safetensors` | the cotangents of stack S where segment L of the model starts (factored/descent.py) |

That is what lies between two stages; of one that was stopped the passes are made again. Files are written whole or not
at all, and have checksums. A damaged or missing one is computed again. Under another memory limit the pass is planned
anew: what was kept is of use where the plan is the same, and else is deleted.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fisherfunc.gradients.fingerprint import differences
from fisherfunc.records.plain import from_plain, to_plain
from fisherfunc.records.tensor_files import DamagedError, read_tensors, write_tensors

FORMAT = "fisherfunc.checkpoint.3"
SUFFIX = ".safetensors"
INDEX = f"plan{SUFFIX}"


class Checkpoint(ABC):
    """Where a pass keeps what it has done.

    Attributes:
        keeps: Whether anything is kept.
        plan: That of the pass that began here; None where none did, or it had another memory limit.
        note: What that pass said of itself.
        resumed: What became of it under another memory limit; empty where that is the same, or there was none.
    """

    keeps: bool
    plan: Any
    note: str
    resumed: str

    @abstractmethod
    def begin(self, plan: Any, note: str = "") -> None:
        """Whatever was kept under another plan is of no use, and is deleted."""

    @abstractmethod
    def has(self, part: str) -> bool:
        """Whether a part is kept, perhaps damaged."""

    @abstractmethod
    def read(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the header of a part; None where it is missing or damaged."""

    @abstractmethod
    def write(self, part: str, tensors: Mapping[str, Tensor], header: Any) -> None:
        """Keep a part."""

    @abstractmethod
    def drop(self, prefix: str) -> None:
        """Delete the parts whose names begin so."""

    @abstractmethod
    def under(self, name: str) -> "Checkpoint":
        """Another one inside, for a pass of its own."""


class Nowhere(Checkpoint):
    """No folder: nothing is kept."""

    keeps = False
    plan = None
    note = ""
    resumed = ""

    def begin(self, plan: Any, note: str = "") -> None:
        """Nothing to do."""

    def has(self, part: str) -> bool:
        """Never."""
        return False

    def read(self, part: str) -> None:
        """Nothing."""

    def write(self, part: str, tensors: Mapping[str, Tensor], header: Any) -> None:
        """Nothing to do."""

    def drop(self, prefix: str) -> None:
        """Nothing to do."""

    def under(self, name: str) -> "Nowhere":
        """The same."""
        return self


class Folder(Checkpoint):
    """A folder for one pass; two processes may not use it at once.

    Args:
        path: Made where it is missing.
        fingerprint: Of the pass.

    Raises:
        ValueError: If the folder is of another pass, damaged, or no checkpoint and not empty.
        OSError: If it cannot be made or read.
    """

    keeps = True

    def __init__(self, path: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self._path, self._fingerprint = Path(path), dict(fingerprint)
        self.plan: Any = None
        self.note = self.resumed = ""
        self._kept: Any = None
        self._other_limit = ""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(f"checkpoint={str(path)!r} is a file; give a folder") from error
        for left in self._path.glob(f".*{SUFFIX}"):  # by a process that was killed while it wrote
            left.unlink()
        header = self._header()
        if header is not None:
            self._kept = from_plain(header["plan"])
            limits = [marks.get("memory_limit") for marks in (header["fingerprint"], self._fingerprint)]
            if limits[0] == limits[1]:
                self.plan, self.note = self._kept, header["note"]
            else:
                self._other_limit = f"under a memory limit of {limits[1]} bytes, {limits[0]} before"

    def begin(self, plan: Any, note: str = "") -> None:
        """Whatever was kept under another plan is of no use, and is deleted."""
        if self.plan == plan:
            return
        use = "what was kept was gone on from"
        if self._kept != plan:
            use = "what was kept was of another plan and was computed again"
            for file in [*self._path.rglob(f"*{SUFFIX}")]:  # before the plan changes: they are of the old one
                if file.name != INDEX or file.parent != self._path:
                    file.unlink()
        header = {"format": FORMAT, "fingerprint": self._fingerprint, "plan": to_plain(plan), "note": note}
        with self._writing():
            write_tensors(self._path / INDEX, {}, header)
        if self._other_limit:
            self.resumed = f"{self._other_limit}: {use}"
        self.plan = self._kept = plan
        self.note = note

    def has(self, part: str) -> bool:
        """Whether a part is kept, perhaps damaged."""
        return self._file(part).exists()

    def read(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the header of a part; None where it is missing or damaged."""
        try:
            return read_tensors(self._file(part))
        except (FileNotFoundError, DamagedError):
            return None

    def write(self, part: str, tensors: Mapping[str, Tensor], header: Any) -> None:
        """Keep a part."""
        with self._writing():
            write_tensors(self._file(part), tensors, header)

    def drop(self, prefix: str) -> None:
        """Delete the parts whose names begin so."""
        for file in self._path.glob(f"{prefix}*{SUFFIX}"):
            file.unlink(missing_ok=True)

    def under(self, name: str) -> "Folder":
        """Another one inside, for a pass of its own over the same."""
        return Folder(self._path / name, self._fingerprint)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say which folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"checkpoint={str(self._path)!r} cannot be written ({error.strerror or error}); what was written "
                "before is kept: make room, or give a folder on another disk"
            ) from error

    def _file(self, part: str) -> Path:
        return self._path / f"{part}{SUFFIX}"

    def _header(self) -> Any:
        """What the plan's file says; None in an empty folder."""
        remedy = "give another folder, or delete this one to begin again"
        try:
            _, header = read_tensors(self._path / INDEX)
        except FileNotFoundError:
            if any(self._path.iterdir()):
                raise ValueError(
                    f"checkpoint={str(self._path)!r} holds other files and no {INDEX}; give an empty or a new folder"
                ) from None
            return None
        except DamagedError as error:
            raise ValueError(f"{error}, and the rest of the checkpoint is of no use without it; {remedy}") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{self._path} has format {header.get('format')!r}, expected {FORMAT!r}; {remedy}")
        found = differences(header["fingerprint"], self._fingerprint)
        if found:
            raise ValueError(f"the checkpoint in {self._path} is of another run; these differ: {found}; {remedy}")
        return header


NOWHERE = Nowhere()


def stage_of(number: int) -> str:
    """The part that holds the Grams of a stage."""
    return f"grams-{number}"


def finished_grams(checkpoint: Checkpoint, stage: int, like: Tensor) -> dict[str, Tensor] | None:
    """The Grams as a finished stage left those that it added to; None where it is not finished.

    Args:
        checkpoint: Where.
        stage: Its number.
        like: A tensor on the device of the pass.
    """
    found = checkpoint.read(stage_of(stage))
    return None if found is None else {label: found[0][label].to(like.device, copy=True) for label in found[0]}


def folder_of(folder: Path, *, rank: int = 0, size: int = 1) -> Path:
    """Return the folder of one of several ranks, each of which keeps the Grams of its own rows; of one, `folder`.

    Raises:
        ValueError: If what is kept there is of another number of ranks.
    """
    kept = (re.fullmatch(r"rank-\d+-of-(\d+)", found.parent.name) for found in folder.glob(f"rank-*-of-*/{INDEX}"))
    sizes = {int(match[1]) for match in kept if match}
    sizes |= {1} if (folder / INDEX).exists() else set()
    if sizes - {size}:
        other = min(sizes - {size})
        raise ValueError(
            f"checkpoint={str(folder)!r} is of a run by {_named(other)}, and this one is by {_named(size)}: what was "
            f"kept is divided between them; start as many to go on from it, or give another folder"
        )
    return folder if size == 1 else folder / f"rank-{rank}-of-{size}"


def _named(size: int) -> str:
    return "one process" if size == 1 else f"{size} ranks"


def opened(path: str | os.PathLike[str] | None, fingerprint: Callable[[], Mapping[str, str]]) -> Checkpoint:
    """The folder of a pass; nowhere where `path` is None.

    Raises:
        ValueError: If the folder is not one of this pass.
        OSError: If it cannot be made or read.
    """
    return NOWHERE if path is None else Folder(path, fingerprint())


def holds_parts(path: str | Path) -> bool:
    """Whether a folder, or one inside it, keeps anything beside a plan, perhaps damaged.

    Args:
        path: Of the folder, which may be missing.
    """
    return any(file.name != INDEX and file.name[0] != "." for file in Path(path).rglob(f"*{SUFFIX}"))
