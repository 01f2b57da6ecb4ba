"""Results as a screen, as a data frame and as a LaTeX table: all from the metrics of each matrix."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fisherfunc.gradients.sources import told
from fisherfunc.linalg import metrics
from fisherfunc.linalg.sketched_rows import error_lines
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.linalg.which_fisher import EMPIRICAL, matrix
from fisherfunc.population.summary import PopulationSummary
from fisherfunc.records.sheet import Sheet, figure, number_of

COLUMNS = {
    "num_tokens": "N",
    "num_params": "P",
    "largest": "λ_max",
    "second": "λ_2",
    "effective_rank": "eff. rank",
    "trace": "trace",
}
_TEX = {"λ_max": r"$\lambda_{\max}$", "λ_2": r"$\lambda_2$", "N": "$N$", "P": "$P$"}
_SPECIAL = {letter: "\\" + letter for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def result_sheet(
    spectra: Mapping[str, Spectrum], metadata: Mapping[str, Any], population: PopulationSummary | None
) -> Sheet:
    """Return the screen of a result: a row per matrix, the whole ones last.

    Args:
        spectra: {label: spectrum}.
        metadata: Of the result.
        population: What holds of the population, where that is known.
    """
    unit, full = metadata.get("unit", "token"), list(spectra.values())[-1]
    floor = number_of(full.resolution)
    if floor is None or full.eigenvalues.ndim != 1:
        return Sheet(title=f"Spectra of the {which(metadata)}, stacked: of {', '.join(spectra)}")
    largest = float(full.eigenvalues[0])
    notes = [f"eigenvalues of F = (1/N) GᵀG in nats² per {unit}, losses summed; .blocks[label], .block_diagonal, .full"]
    if largest:
        notes.append(f"below {floor / largest:.1e} λ_max of the full matrix nothing is resolved")
    notes += [f"approximation: {text}" for text in metadata.get("approximations") or ()]
    notes += [*told(metadata), *error_lines(metadata)]
    model = metadata.get("model_id") or metadata.get("model")
    if population is not None:
        trace, leading = population.trace.full, population.leading_eigenvalue
        notes.append(
            f"of the population: trace {figure(trace.estimate)} ({figure(trace.low)} … {figure(trace.high)}), "
            f"λ_max between {figure(leading.low)} and {figure(leading.high)}"
        )
    return Sheet(
        title=f"Spectrum of the {which(metadata)}" + (f" of {model}" if model else ""),
        columns=("block", *COLUMNS.values()),
        rows=[(label, *_cells(spectrum)) for label, spectrum in spectra.items()],
        notes=notes,
        lines={label: _resolved(spectrum) for label, spectrum in spectra.items()},
    )


def which(metadata: Mapping[str, Any]) -> str:
    """Return which matrix a result is of, in words."""
    return "gradient covariance" if metadata.get("centered") else matrix(metadata.get("fisher", EMPIRICAL))


def metric_frame(spectra: Mapping[str, Spectrum]) -> Any:
    """Return a pandas DataFrame with a row per matrix: its label and every metric; what does not exist is missing."""
    rows = [{"block": label, **metrics.summary(spectrum)} for label, spectrum in spectra.items()]
    return _pandas().DataFrame(rows)


def eigenvalue_frame(spectra: Mapping[str, Spectrum]) -> Any:
    """Return a pandas DataFrame with a row per eigenvalue: block, rank, eigenvalue, and whether it is resolved."""
    rows = [
        {"block": label, "rank": rank, "eigenvalue": value, "resolved": value > spectrum.resolution.item()}
        for label, spectrum in spectra.items()
        for rank, value in enumerate(spectrum.eigenvalues.tolist(), start=1)
    ]
    return _pandas().DataFrame(rows)


def value_frame(values: Mapping[str, Mapping[str, Mapping[str, Any]]], **others: Mapping[str, Any]) -> Any:
    """Return a pandas DataFrame with a row per result, block and metric.

    Args:
        values: {block: {metric: {result: value}}}.
        **others: Tables of the same keys, a column each.
    """
    rows = [
        {"result": result, "block": block, "metric": metric, "value": value}
        | {name: table[block][metric][result] for name, table in others.items()}
        for block, metrics_of in values.items()
        for metric, row in metrics_of.items()
        for result, value in row.items()
    ]
    return _pandas().DataFrame(rows)


def latex(sheet: Sheet, *, num_whole: int) -> str:
    """Return the table of a sheet as LaTeX for the package booktabs, the last rows below a rule.

    Args:
        sheet: What to set.
        num_whole: How many rows stand below the rule.
    """
    rows = [" & ".join([_tex(row[0]), *map(_tex_number, row[1:])]) + r" \\" for row in sheet.rows]
    rows.insert(len(rows) - num_whole, r"\midrule")
    head = " & ".join(_TEX.get(name, _tex(name)) for name in sheet.columns) + r" \\"
    body = [r"\begin{tabular}{l" + "r" * (len(sheet.columns) - 1) + "}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*body, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def _tex_number(cell: str) -> str:
    """A cell of `figure`: powers of ten as such, thousands apart, a dash where there is nothing."""
    digits, _, power = cell.partition("e")
    if cell == "–":
        return "--"
    return f"${digits} \\times 10^{{{int(power)}}}$" if power else cell.replace(",", "{,}")


def _cells(spectrum: Spectrum) -> list[str]:
    values: dict[str, Any] = metrics.summary(spectrum)
    return [figure(values[key]) for key in COLUMNS]


def _resolved(spectrum: Spectrum) -> list[float]:
    return spectrum.eigenvalues[spectrum.eigenvalues > spectrum.resolution].tolist()


def _pandas() -> Any:
    try:
        return import_module("pandas")
    except ImportError as error:
        raise ImportError(
            f'a data frame needs pandas ({error}); install it: pip install "fisherfunc[pandas]"'
        ) from error
