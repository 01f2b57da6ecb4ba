"""Texts larger than what is tokenised whole: some of a file, from any place of it; the beginnings of a stream."""

import io
import os
from collections.abc import Iterator
from typing import BinaryIO

from fisherfunc.models.sampled_windows import Excerpt, Excerpts
from fisherfunc.surface.jobs.texts import (
    check_encoding,
    decoded,
    document_of,
    documents_of,
    has_documents,
    is_stream,
    opened,
)

WHOLE = 2**22
"""Bytes of a text that is tokenised whole: 4 MB take 9 s and 0.7 GB on one core, by the tokenizer of the embedded
model; 16 MB 43 s and 2.5 GB."""
BEGINNING = 2**18
"""Bytes that are read of a stream first: half a second of tokenising."""
SHARE = 64
"""A text of fewer bytes than so many for each token that is wanted is read whole: windows would run into each other."""
LOOK = 4096
"""Bytes within which a line, or else a word, begins."""
BLOCK = 2**16


def size_if_large(path: str | None, num_tokens: int) -> int | None:
    """Return the bytes of a text of which only some are to be read; None where it is read whole, or is a stream.

    Args:
        path: A file, "-" for standard input, or None for the embedded sample.
        num_tokens: How many tokens are wanted of it.

    Raises:
        OSError: If the file cannot be read.
    """
    if path is None or is_stream(path):
        return None
    size = os.path.getsize(path)
    return size if size > max(WHOLE, SHARE * num_tokens) else None


def excerpts_of(path: str) -> Excerpts:
    """Return what reads some of a file: of JSON Lines, of the document at a place.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it begins with the mark of another encoding than UTF-8.
    """
    with opened(path) as file:
        check_encoding(file.read(4), path)

    def of_text(place: float, span: int, length: int) -> Excerpt:
        with opened(path) as file:
            size = file.seek(0, io.SEEK_END)
            return _of_text(file, path, int(place * size), length)

    def of_documents(place: float, span: int, length: int) -> Excerpt:
        with opened(path) as file:
            size = file.seek(0, io.SEEK_END)
            begin, line, share = _line_at(file, int(place * size))
        text = (
            document_of(decoded(line, path, at=begin), f"the line at byte {begin:,} of {path}") if line.strip() else ""
        )
        return _of_document(begin, text, int(share * len(text)) // span * span, length)

    return of_documents if has_documents(path) else of_text


def _of_text(file: BinaryIO, path: str, offset: int, length: int) -> Excerpt:
    """The text from the next line, or word, after an offset."""
    file.seek(offset)
    most = LOOK + 4 * length  # a character is up to four bytes
    content = file.read(most)
    begin = _beginning(content[:LOOK]) if offset else 0
    text = decoded(content[begin:], path, at=offset + begin, whole=len(content) < most)
    kept = text[:length]
    return Excerpt(
        document=0,
        begin=offset + begin,
        end=offset + begin + len(kept.encode()),
        text=kept,
        ends=len(content) < most and kept == text,
    )


def _beginning(content: bytes) -> int:
    """How many bytes lie before the first line; before the first word, or the first character, where none begins."""
    for mark in (b"\n", b" "):
        if mark in content:
            return content.index(mark) + 1
    return next((place for place, byte in enumerate(content) if byte & 0xC0 != 0x80), 0)


def _line_at(file: BinaryIO, offset: int) -> tuple[int, bytes, float]:
    """Where the line around an offset begins, the line, and which share of it lies before the offset."""
    begin, before = offset, b""
    while begin and b"\n" not in before:
        step = min(BLOCK, begin)
        file.seek(begin - step)
        before = file.read(step)
        begin -= step
    if b"\n" in before:
        begin += before.rfind(b"\n") + 1
    file.seek(begin)
    line = file.readline()
    return begin, line, min((offset - begin) / max(len(line), 1), 1.0)


def _of_document(document: int, text: str, place: int, length: int) -> Excerpt:
    """A document from the next word after a place in it."""
    if place:
        spaces = [at + 1 for mark in ("\n", " ") if (at := text.find(mark, place, place + LOOK)) >= 0]
        place = min(spaces, default=place)
    kept = text[place : place + length]
    end = place + len(kept)
    return Excerpt(document=document, begin=place, end=end, text=kept, ends=end >= len(text))


def beginnings(path: str, *, most: int = BEGINNING) -> Iterator[tuple[list[str], bool]]:
    """Read a stream, and give the documents of ever longer beginnings, and whether these are all.

    Each is twice as long as the one before. No line of JSON Lines is cut, and no word where there are words.

    Args:
        path: A pipe, or "-" for standard input.
        most: The bytes of the first.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no text (see `read_text`).
    """
    name = "standard input" if path == "-" else path
    with opened(path) as stream:
        content, ends = b"", False
        while not ends:
            content += stream.read(most + 1 - len(content))
            ends = len(content) <= most
            check_encoding(content, name)
            part = content if ends else content[: _last_cut(content[:most], documents=has_documents(path))]
            yield documents_of(decoded(part, name, whole=ends), path), ends
            most *= 2


def _last_cut(content: bytes, *, documents: bool) -> int:
    marks = (b"\n",) if documents else (b"\n", b" ")
    return max(content.rfind(mark) for mark in marks) + 1 or (0 if documents else len(content))
