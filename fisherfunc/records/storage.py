"""Files written whole or not at all: a temporary file beside the target, then one atomic rename.

And large ones piece by piece, which are whole when all pieces are there.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder; rename it to `path` on success, delete it on any failure.

    Args:
        path: The file to write. Its folder must exist.

    Yields:
        The path to write to. It keeps the suffix of `path`.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_pieces(path: Path, pieces: Iterable[memoryview]) -> None:
    """Write a file of bytes, each piece as it comes.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())


def read_pieces(path: Path, rooms: Iterable[memoryview]) -> Iterator[None]:
    """Fill one piece of memory after the other with the bytes of a file.

    Yields:
        Nothing, when a piece is full.

    Raises:
        EOFError: If the file has ended before.
    """
    with path.open("rb", buffering=0) as file:
        for room in rooms:
            while room:
                count = file.readinto(room)
                if not count:
                    raise EOFError(f"{path} has ended before its last piece")
                room = room[count:]
            yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
