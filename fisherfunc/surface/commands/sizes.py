"""Sizes of memory, as people write them."""

import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """A size in bytes from "2GB", "500 MB", "1.5GiB" or plain bytes.

    Raises:
        ValueError: If it is not such a size, or not positive.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("1.5GiB"), parse_bytes("4096")
        (2000000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ValueError(f"a memory size like 2GB, 500MB or 1.5GiB was expected, got {text!r}")
    return size
