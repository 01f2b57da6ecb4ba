"""What report, plot and command line call things: the matrix, its units, numbers, and the notes on a result.

Every function takes the provenance of a result; what that does not say is passed over.
"""

from collections.abc import Mapping

from fisherfunc.gradients.data.sources import told
from fisherfunc.linalg.grams.sketched_rows import error_lines
from fisherfunc.linalg.grams.which_fisher import EMPIRICAL, matrix
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.visible import visible

NOTHING = "–"
_NEEDED = {"block_diagonal_error": "‖F − F_bd‖/‖F‖"}


def matrix_name(provenance: Provenance) -> str:
    """Which matrix the spectrum is of. "Fisher" never stands alone.

    Example:
        >>> matrix_name(Provenance(fisher="empirical")), matrix_name(Provenance(fisher="true (Monte-Carlo, 2 draws)"))
        ('empirical Fisher', 'true Fisher (Monte-Carlo, 2 draws)')
        >>> matrix_name(Provenance(centered=True))
        'gradient covariance'
    """
    return "gradient covariance" if provenance.centered else matrix(provenance.fisher or EMPIRICAL)


def model_name(provenance: Provenance) -> str | None:
    """The name of the model, else of its class; None where neither is known."""
    name = provenance.model_id or provenance.model
    return name and visible(str(name))


def windows(provenance: Provenance) -> list[str]:
    """The line that says which windows of the text the tokens are of, and what they begin with, where that is known.

    Example:
        >>> [windows(Provenance(context=64, window_start=start))[0] for start in (["<s>"], [])]
        ['Windows of 64 positions that begin with <s>', 'Windows of 64 positions without a start token']
        >>> nine = {"context": 64, "num_windows": 9}
        >>> windows(Provenance(**nine, windows_of_text=70))
        ['9 windows of 64 positions, spread evenly over the 70 of the text']
        >>> windows(Provenance(**nine))
        ['9 windows of 64 positions, the first of a stream']
        >>> windows(Provenance(**nine, bytes_of_text=2_500_000_000))
        ['9 windows of 64 positions, spread evenly over the 2,500 MB of the text']
        >>> windows(Provenance(**nine, windows_of_text=9, num_documents=4))
        ['9 windows of 64 positions, all of the text, from 4 documents']
    """
    start, count = provenance.window_start, provenance.num_windows
    if start is None and count is None:
        return []
    begin = visible(" ".join(map(str, start or ())))
    line = f"{'Windows' if count is None else f'{count:,} windows'} of {provenance.context} positions"
    line += "" if start is None else f" that begin with {begin}" if begin else " without a start token"
    if count is not None:
        total, size = provenance.windows_of_text or None, provenance.bytes_of_text
        whole = f"{total or 0:,}" if size is None else f"{size / 1e6:,.0f} MB"
        if total is None and size is None:
            line += ", the first of a stream"
        else:
            line += ", all of the text" if count == total else f", spread evenly over the {whole} of the text"
    documents = provenance.num_documents or None
    return [line + ("" if documents is None else f", from {documents:,} documents")]


def count_of_units(provenance: Provenance) -> str:
    """How many units, and of what; and how many rows they have, where that is more.

    Example:
        >>> count_of_units(Provenance(num_tokens=512))
        '512 tokens'
        >>> count_of_units(Provenance(num_tokens=512, num_rows=1024))
        '512 tokens, 1,024 rows'
    """
    count, unit = provenance.num_tokens or 0, provenance.unit or "token"
    rows = provenance.num_rows or count
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


def notes(provenance: Provenance) -> list[str]:
    """One sentence for everything that made a result other than plain and exact."""
    found = [f"approximation: {text}" for text in provenance.approximations or ()]
    found += [*told(provenance.data), *error_lines(provenance.sketch)]
    found += [f"solver fallback in {label}: {why}" for label, why in (provenance.fallback or {}).items()]
    if provenance.centered and provenance.num_tokens == 1:
        found.append("one unit less its mean is zero, and so is its covariance: take more units")
    if provenance.adapter_of:
        base = visible(str(provenance.adapter_of))
        found.append(f"adapter of {base}: the parameters are the adapter's, those of the base are frozen")
    if provenance.resumed:
        found.append(f"resumed {provenance.resumed}")
    if provenance.dropped_tokens:
        found.append(f"{provenance.dropped_tokens:,} token(s) with a non-finite loss or gradient were dropped")
    return found
