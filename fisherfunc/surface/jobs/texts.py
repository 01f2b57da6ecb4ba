"""The text of a run, from a file, standard input or the package: UTF-8, no byte-order mark, Unix ends of lines.

Of JSON Lines, each line is a document: a string, or an object whose "text" is one.
"""

import codecs
import json
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from fisherfunc import assets

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is the beginning of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
JSON_LINES = (".jsonl", ".ndjson")
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # also at the beginning of a later line, where files were joined


def has_documents(path: str | None) -> bool:
    """Return whether a text is JSON Lines, by its name."""
    return path is not None and Path(path).suffix.lower() in JSON_LINES


def is_stream(path: str | None) -> bool:
    """Return whether a text comes from standard input or a pipe, of which nobody knows how it goes on."""
    return path is not None and (path == "-" or not Path(path).is_file())


def read_documents(path: str | None) -> list[str]:
    """Return the documents of JSON Lines, or a text as one document (see `read_text`).

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no text, or a line of JSON Lines holds no text; it names the line.
    """
    return documents_of(read_text(path), path)


def documents_of(text: str, path: str | None) -> list[str]:
    """Return the documents of a text: its lines where it is JSON Lines by its name, else the text.

    Raises:
        ValueError: If a line of JSON Lines holds no text; it names the line.
    """
    if not has_documents(path):
        return [text]
    lines = enumerate(text.split("\n"), start=1)
    return [document_of(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def document_of(line: str, name: str) -> str:
    """Return the text of a line of JSON Lines.

    Raises:
        ValueError: If it holds none; it names the line.
    """
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); each line of JSON Lines is a document") from error
    found = content.get("text") if isinstance(content, dict) else content
    if not isinstance(found, str):
        keys = f" with the keys {sorted(content)}" if isinstance(content, dict) else ""
        raise ValueError(
            f'{name} expected a string, or an object whose "text" is one, got {type(content).__name__}{keys}; '
            "give each document such a line"
        )
    return found


def read_text(path: str | None) -> str:
    """Return the text of a file, of standard input for "-", or of the embedded sample for None.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not UTF-8, or holds a NUL character: it is in another encoding, or no text.
    """
    if path is None:
        return assets.sample_text().read_text(encoding="utf-8")
    name = "standard input" if path == "-" else path
    with opened(path) as file:
        content = file.read()
    check_encoding(content, name)
    return decoded(content, name)


def check_encoding(content: bytes, name: str) -> None:
    """Raise a ValueError where a text begins with the mark of another encoding than UTF-8."""
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{name} is {encoding} text, expected UTF-8; convert it: iconv -f {encoding} -t UTF-8")


def decoded(content: bytes, name: str, *, at: int = 0, whole: bool = True) -> str:
    """Return bytes of a text as text, without marks and with ends of lines as on Unix.

    Args:
        content: The bytes.
        name: What an error calls the text.
        at: Where in the text they begin, in bytes.
        whole: Whether they end where the text does; a character that is cut at the end is left out where they do not.

    Raises:
        ValueError: If it is not UTF-8, or holds a NUL character: it is in another encoding, or no text.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(content, whole)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (see byte {at + error.start}); convert it") from error
    if "\0" in text:  # UTF-16 without a mark may be valid UTF-8: letters between NULs
        raise ValueError(
            f"{name} holds NUL characters, {text.count(chr(0)):,} of {len(text):,} (the first is character "
            f"{text.index(chr(0))}), so it is UTF-16 without a byte-order mark, or no text; convert it: "
            "iconv -f UTF-16LE -t UTF-8, or take them out: tr -d '\\000'"
        )
    return _MARKS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def opened(path: str) -> AbstractContextManager[BinaryIO]:
    """Open a text, or take standard input for "-".

    Raises:
        OSError: If the file cannot be read.
        ValueError: If standard input is closed.
    """
    if path != "-":
        return Path(path).open("rb")
    if sys.stdin is None:
        raise ValueError("standard input is closed, and --text - reads it; give a file, or its text by a pipe")
    return nullcontext(sys.stdin.buffer)
