"""Text as a terminal may be given it: what would steer the terminal, or hide or turn what stands there, is shown."""

import re

# C0, DEL, C1; directional marks, embeddings, overrides and isolates; separators of lines and paragraphs; what has no
# width and no glyph (not the joiners U+200C and U+200D, which shape letters and emoji); lone surrogates.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
    "\ud800-\udfff]"
)


def visible(text: str) -> str:
    r"""Return the text with a sign in the place of every character that controls a terminal or the direction of text.

    Example:
        >>> visible("a\x1b[31mb\x07\x00\n"), visible("\u202eabc\x9b"), visible("naïve 文 λ")
        ('a␛[31mb␇␀␊', '<U+202E>abc<U+009B>', 'naïve 文 λ')
    """
    return _HIDDEN.sub(lambda match: _sign(ord(match[0])), text)


def escaped_json(text: str) -> str:
    r"""Return the same JSON with the same characters in the escapes of JSON; they stand in its strings alone.

    Example:
        >>> escaped_json('{"text": "\u202eabc"}')
        '{"text": "\\u202eabc"}'
    """
    return _HIDDEN.sub(lambda match: match[0] if match[0] == "\n" else _json_escape(match[0]), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def _json_escape(character: str) -> str:
    """In UTF-16, as JSON has it: two of them beyond U+FFFF."""
    encoded = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{encoded[start : start + 4]}" for start in range(0, len(encoded), 4))
