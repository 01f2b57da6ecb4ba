"""The text of a run, from a file, standard input or the package: UTF-8, no byte-order mark, Unix ends of lines."""

import codecs
import re
import sys
from pathlib import Path

from fisherfunc import assets

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is the beginning of this one
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # also at the beginning of a later line, where files were joined


def read_text(path: str | None) -> str:
    """Return the text of a file, of standard input for "-", or of the embedded sample for None.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not UTF-8, or holds a NUL character: it is in another encoding, or no text.
    """
    if path is None:
        return assets.sample_text().read_text(encoding="utf-8")
    name = "standard input" if path == "-" else path
    content = _standard_input() if path == "-" else Path(path).read_bytes()
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{name} is {encoding} text, expected UTF-8; convert it: iconv -f {encoding} -t UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (see byte {error.start}); convert it") from error
    if "\0" in text:  # UTF-16 without a mark may be valid UTF-8: letters between NULs
        raise ValueError(
            f"{name} holds NUL characters, {text.count(chr(0)):,} of {len(text):,} (the first is character "
            f"{text.index(chr(0))}), so it is UTF-16 without a byte-order mark, or no text; convert it: "
            "iconv -f UTF-16LE -t UTF-8, or take them out: tr -d '\\000'"
        )
    return _MARKS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ValueError("standard input is closed, and --text - reads it; give a file, or its text by a pipe")
    return sys.stdin.buffer.read()
