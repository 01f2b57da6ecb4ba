"""What report, plot and command line call things: the matrix, its units, numbers, and the notes on a result.

Every function takes the metadata of a result; a key that is absent is passed over.
"""

from collections.abc import Mapping
from typing import Any

from fisherfunc.gradients.data.sources import told
from fisherfunc.linalg.grams.sketched_rows import error_lines
from fisherfunc.linalg.grams.which_fisher import EMPIRICAL, matrix
from fisherfunc.surface.visible import visible

NOTHING = "–"
_NEEDED = {"block_diagonal_error": "‖F − F_bd‖/‖F‖"}


def matrix_name(metadata: Mapping[str, Any]) -> str:
    """Which matrix the spectrum is of. "Fisher" never stands alone.

    Example:
        >>> matrix_name({"fisher": "empirical"}), matrix_name({"fisher": "true (Monte-Carlo, 2 draws)"})
        ('empirical Fisher', 'true Fisher (Monte-Carlo, 2 draws)')
        >>> matrix_name({"centered": True})
        'gradient covariance'
    """
    return "gradient covariance" if metadata.get("centered") else matrix(metadata.get("fisher", EMPIRICAL))


def model_name(metadata: Mapping[str, Any]) -> str | None:
    """The name of the model, else of its class; None where neither is known."""
    name = metadata.get("model_id") or metadata.get("model")
    return name and visible(str(name))


def windows(metadata: Mapping[str, Any]) -> list[str]:
    """The line that says which windows of the text the tokens are of, and what they begin with, where that is known.

    Example:
        >>> windows({"context": 64, "window_start": ["<s>"]}), windows({"context": 64, "window_start": []})
        (['Windows of 64 positions that begin with <s>'], ['Windows of 64 positions without a start token'])
        >>> windows({"context": 64, "num_windows": 9, "windows_of_text": 70})
        ['9 windows of 64 positions, spread evenly over the 70 of the text']
        >>> windows({"context": 64, "num_windows": 9, "windows_of_text": None})
        ['9 windows of 64 positions, the first of a stream']
        >>> windows({"context": 64, "num_windows": 9, "windows_of_text": None, "bytes_of_text": 2_500_000_000})
        ['9 windows of 64 positions, spread evenly over the 2,500 MB of the text']
        >>> windows({"context": 64, "num_windows": 9, "windows_of_text": 9, "num_documents": 4})
        ['9 windows of 64 positions, all of the text, from 4 documents']
    """
    start, count = metadata.get("window_start"), metadata.get("num_windows")
    if start is None and count is None:
        return []
    begin = visible(" ".join(map(str, start or ())))
    line = f"{'Windows' if count is None else f'{count:,} windows'} of {metadata.get('context')} positions"
    line += "" if start is None else f" that begin with {begin}" if begin else " without a start token"
    if count is not None:
        total, size = metadata.get("windows_of_text"), metadata.get("bytes_of_text")
        whole = f"{total or 0:,}" if size is None else f"{size / 1e6:,.0f} MB"
        if total is None and size is None:
            line += ", the first of a stream"
        else:
            line += ", all of the text" if count == total else f", spread evenly over the {whole} of the text"
    documents = metadata.get("num_documents")
    return [line + ("" if documents is None else f", from {documents:,} documents")]


def count_of_units(metadata: Mapping[str, Any]) -> str:
    """How many units, and of what; and how many rows they have, where that is more.

    Example:
        >>> count_of_units({"num_tokens": 512, "unit": "token"})
        '512 tokens'
        >>> count_of_units({"num_tokens": 512, "unit": "token", "num_rows": 1024})
        '512 tokens, 1,024 rows'
    """
    count, unit = metadata.get("num_tokens", 0), metadata.get("unit", "token")
    rows = metadata.get("num_rows", count)
    return f"{count:,} {unit}" + ("" if count == 1 else "s") + (f", {rows:,} rows" if rows != count else "")


def tokens_lines(needed: Mapping[str, Mapping[str, int | None]]) -> list[str]:
    """The lines that say how many tokens numbers take to be within 10 %.

    Example:
        >>> for line in tokens_lines({"trace": {"sample": None, "population": 3125},
        ...                           "participation_ratio": {"sample": 64321, "population": None}}): print(line)
        Within 10 % from so many tokens on, as estimated; of the tokens themselves:
          trace: 3,100
          participation ratio: –; 64,000
    """

    def told(name: str, sample: int | None, population: int | None) -> str:
        text = f"  {_NEEDED.get(name, name.replace('_', ' '))}: {_about(population)}"
        return text + ("" if sample is None else f"; {_about(sample)}")

    parts = [told(name, found["sample"], found["population"]) for name, found in needed.items()]
    return ["Within 10 % from so many tokens on, as estimated; of the tokens themselves:", *parts]


def _about(count: int | None) -> str:
    """To two digits."""
    return NOTHING if count is None else f"{int(float(f'{count:.1e}')):,}"


def number(value: float | None, *, digits: int = 4, scientific: bool = True) -> str:
    """A number to so many significant digits; a dash where there is none.

    Example:
        >>> number(0.0012345), number(12.346, scientific=False), number(None), number(0.0)
        ('1.234e-03', '12.35', '–', '0')
        >>> number(1023.7, scientific=False)
        '1024'
    """
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if scientific:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - len(str(int(abs(value)))))}f}"


def compact(count: int | None) -> str:
    """A count in at most six characters.

    Example:
        >>> compact(512), compact(163_037_184), compact(None)
        ('512', '163.0M', '–')
    """
    if count is None:
        return NOTHING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= max(size, 1e4):
            return f"{count / size:.1f}{letter}"
    return str(count)


def notes(metadata: Mapping[str, Any]) -> list[str]:
    """One sentence for everything that made a result other than plain and exact."""
    dropped = metadata.get("dropped_tokens") or 0
    dropped = dropped if isinstance(dropped, int) else len(dropped)
    found = [f"approximation: {text}" for text in metadata.get("approximations") or ()]
    found += [*told(metadata), *error_lines(metadata)]
    found += [f"solver fallback in {label}: {why}" for label, why in (metadata.get("fallback") or {}).items()]
    if metadata.get("centered") and metadata.get("num_tokens") == 1:
        found.append("one unit less its mean is zero, and so is its covariance: take more units")
    if metadata.get("adapter_of"):
        base = visible(str(metadata["adapter_of"]))
        found.append(f"adapter of {base}: the parameters are the adapter's, those of the base are frozen")
    if metadata.get("resumed"):
        found.append(f"resumed {metadata['resumed']}")
    if dropped:
        found.append(f"{dropped:,} token(s) with a non-finite loss or gradient were dropped")
    return found
