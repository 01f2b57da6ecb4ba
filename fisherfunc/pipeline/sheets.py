"""Results as a screen, as a data frame and as a LaTeX table: all from the metrics of each matrix."""

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fisherfunc.gradients.data.sources import told as told_of_data
from fisherfunc.linalg import metrics
from fisherfunc.linalg.grams.sketched_rows import error_lines
from fisherfunc.linalg.grams.which_fisher import EMPIRICAL, matrix
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.population.estimate import Estimate
from fisherfunc.population.summary import PopulationSummary
from fisherfunc.records.provenance import Provenance
from fisherfunc.records.sheet import NOTHING, Sheet, figure, number_of

NO_INTERVAL = "no interval"
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
    spectra: Mapping[str, Spectrum], provenance: Provenance, population: PopulationSummary | None
) -> Sheet:
    """Return the screen of a result: a row per matrix, the whole ones last.

    Args:
        spectra: {label: spectrum}.
        provenance: Of the result.
        population: What holds of the population, where that is known.
    """
    unit, full = provenance.unit or "token", list(spectra.values())[-1]
    floor = number_of(full.resolution)
    if floor is None or full.eigenvalues.ndim != 1:
        return Sheet(title=f"Spectra of the {which(provenance)}, stacked: of {', '.join(spectra)}")
    largest = float(full.eigenvalues[0])
    notes = [f"eigenvalues of F = (1/N) GᵀG in nats² per {unit}, losses summed; .blocks[label], .block_diagonal, .full"]
    if largest:
        notes.append(f"below {floor / largest:.1e} λ_max of the full matrix nothing is resolved")
    notes += [f"approximation: {text}" for text in provenance.approximations or ()]
    notes += [*told_of_data(provenance.data), *error_lines(provenance.sketch)]
    model = provenance.model_id or provenance.model
    if population is not None:
        shown = {
            "trace": population.trace.full,
            "participation ratio": population.participation_ratio.full,
            "λ_max": population.leading_eigenvalue,
        }
        notes.append("of the population: " + "; ".join(f"{name} {told(each)}" for name, each in shown.items()))
    return Sheet(
        title=f"Spectrum of the {which(provenance)}" + (f" of {model}" if model else ""),
        columns=("block", *COLUMNS.values()),
        rows=[(label, *_cells(spectrum)) for label, spectrum in spectra.items()],
        notes=notes,
        lines={label: _resolved(spectrum) for label, spectrum in spectra.items()},
    )


def told(estimate: Estimate | None) -> str:
    """Return a point with its interval, or an interval alone; of what has a warning no interval.

    Args:
        estimate: Of the population; None where there is none.

    Example:
        >>> told(Estimate(estimate=2143.0, low=1284.0, high=3577.0, level=0.95, num_clusters=9, method=""))
        '2,143 (1,284 … 3,577)'
    """
    if estimate is None:
        return "not known"
    if estimate.warning is not None:
        return NO_INTERVAL if estimate.estimate is None else f"{short(estimate.estimate)}, {NO_INTERVAL}"
    low, high = short(estimate.low), short(estimate.high)
    return f"{low} … {high}" if estimate.estimate is None else f"{short(estimate.estimate)} ({low} … {high})"


def short(value: float | None) -> str:
    """Return a number to three digits, or to ones.

    Example:
        >>> short(1284.2), short(0.51019), short(None)
        ('1,284', '0.51', '–')
    """
    if value is None or not 1e3 <= abs(value) < 1e7:
        return NOTHING if value is None else f"{value:.3g}"
    return f"{value:,.0f}"


def which(provenance: Provenance) -> str:
    """Return which matrix a result is of, in words."""
    return "gradient covariance" if provenance.centered else matrix(provenance.fisher or EMPIRICAL)


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


def eigenvalue_dataset(spectra: Mapping[str, Spectrum], provenance: Provenance) -> Any:
    """Return an xarray Dataset: eigenvalues and whether they are resolved by (block, rank), each metric by (block).

    Blocks of fewer eigenvalues end in NaN. What does not exist of a metric is NaN.

    Args:
        spectra: {label: spectrum}.
        provenance: Of the result; text and numbers become attributes of the dataset.
    """
    xarray = _imported("xarray", "a Dataset", "xarray")
    longest = max(len(spectrum.eigenvalues) for spectrum in spectra.values())

    def padded(values: Any, filler: Any) -> list[Any]:
        return [*values, *[filler] * (longest - len(values))]

    rows = [spectrum.eigenvalues.tolist() for spectrum in spectra.values()]
    resolved = [(s.eigenvalues > s.resolution).tolist() for s in spectra.values()]
    found = [
        {name: number_of(metric(spectrum)) for name, metric in metrics.SUMMARY.items()} for spectrum in spectra.values()
    ]
    facts = {name: value for name, value in provenance.to_dict().items() if isinstance(value, str | int | float)}
    return xarray.Dataset(
        {
            "eigenvalue": (("block", "rank"), [padded(row, math.nan) for row in rows], {"units": unit_of(provenance)}),
            "resolved": (("block", "rank"), [padded(row, False) for row in resolved]),
            "resolution": (("block",), [float(s.resolution) for s in spectra.values()]),
            **{
                name: (("block",), [math.nan if row[name] is None else row[name] for row in found])
                for name in metrics.SUMMARY
            },
        },
        coords={"block": list(spectra), "rank": range(1, longest + 1)},
        attrs={name: int(value) if isinstance(value, bool) else value for name, value in facts.items()},
    )


def unit_of(provenance: Provenance) -> str:
    """Return the unit of eigenvalues."""
    return f"nats² per {provenance.unit or 'token'}"


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
    return _imported("pandas", "a data frame", "pandas")


def _imported(name: str, what: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'{what} needs {name} ({error}); install it: pip install "fisherfunc[{extra}]"') from error
