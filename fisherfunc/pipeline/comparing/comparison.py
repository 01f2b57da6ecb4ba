"""Several results side by side, as a record: each metric of each block of each result, and how alike they are."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.sheets import value_frame, which
from fisherfunc.population.estimate import BlockEstimates, Estimate
from fisherfunc.population.paired import dimension_estimate
from fisherfunc.records.record import record
from fisherfunc.records.sheet import Sheet, as_html, as_text, figure
from fisherfunc.statistics.coupling import BlockCoupling
from fisherfunc.statistics.resampling.interval import Interval

Table = Mapping[str, Mapping[str, Mapping[str, float | int | None]]]
"""{label: {metric: {name of the result: value}}}; what does not exist is None."""


@record(static=("values", "ratios", "intervals", "paired", "kappa", "differing"))
class Comparison:
    """Results that are of one kind, lined up; the first is what the others are held against.

    Attributes:
        results: {name: spectra}, in order.
        values: {label: {metric: {name: value}}}: the blocks, then `block_diagonal` and `full` (in parentheses where a
            block is called that). None where a result has no such block, or a metric does not exist.
        ratios: Likewise, each value over that of the first result.
        intervals: Likewise, the confidence interval of each value; None where a result has none.
        paired: {label: {estimate: {name: its ratio to that of the first result}}}, with paired intervals: of estimates
            of the population, by their names in `PopulationSummary`, where all results are on the same tokens and
            clusters; None of the first. The trace is the sample's as well.
        kappa: The least κ that all results resolve, of which the effective dimensions are; None where not all have one.
        similarity: {label: (r, r)}: the centred kernel alignment of the token Grams of each pair of results, by block
            and `full`; empty where no Grams were given, or the tokens are not the same.
        overlaps: {label: (r, r)}: the overlap of the leading subspaces of each pair, `subspace_overlap`; empty where no
            eigenvectors were given.
        differing: {aspect: {name: value}}: in what the results differ, by permission.
    """

    results: Mapping[str, FisherSpectrum]
    values: Table
    ratios: Table
    intervals: Mapping[str, Mapping[str, Mapping[str, Interval | None]]]
    paired: Mapping[str, Mapping[str, Mapping[str, Estimate | None]]]
    kappa: float | None
    similarity: dict[str, Float[Tensor, "r r"]]
    overlaps: dict[str, Float[Tensor, "r r"]]
    differing: Mapping[str, Mapping[str, Any]]

    def __repr__(self) -> str:
        """Show it on one screen: a row per result, of the full matrix."""
        return as_text(_sheet(self))

    def _repr_html_(self) -> str:
        """Show it in a notebook: the table, and the spectra of the full matrices."""
        return as_html(_sheet(self))

    def to_dataframe(self) -> Any:
        """Return a tidy pandas DataFrame: a row per result, block and metric, with value and ratio to the first.

        Raises:
            ImportError: If pandas is not installed.
        """
        return value_frame(self.values, ratio=self.ratios)

    @property
    def names(self) -> list[str]:
        """The names of the results, in order."""
        return list(self.results)

    def of_population(self, label: str, name: str) -> list[Estimate | None]:
        """Return an estimate of the population of each result, in order; None where a result has none.

        Args:
            label: Of a block or of the full matrix, as in `values`.
            name: As in `PopulationSummary`: "trace", "squared_norm", "participation_ratio", and, of the full matrix,
                "block_diagonal_error", "leading_eigenvalue", "effective_rank" and "effective_dimension", at `kappa`.
        """
        full = label == list(self.values)[-1]
        return [_estimate(result, label, name, full, self.kappa) for result in self.results.values()]

    @property
    def couplings(self) -> dict[str, BlockCoupling | None]:
        """{name: how the blocks of F hang together}; None where a result does not know."""
        return {name: result.coupling for name, result in self.results.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values that survive JSON; what is undefined is None."""
        return {
            "results": {name: result.metadata for name, result in self.results.items()},
            "differing": {aspect: dict(values) for aspect, values in self.differing.items()},
            "values": _plain(self.values),
            "ratios": _plain(self.ratios),
            "intervals": {
                label: {metric: {n: i.to_dict() for n, i in row.items() if i} for metric, row in rows.items()}
                for label, rows in self.intervals.items()
            },
            "paired": {
                label: {estimate: {n: e.to_dict() for n, e in row.items() if e} for estimate, row in rows.items()}
                for label, rows in self.paired.items()
            },
            "kappa": self.kappa,
            "couplings": {name: c.to_dict() if c else None for name, c in self.couplings.items()},
            "similarity": {label: _rows(matrix) for label, matrix in self.similarity.items()},
            "overlaps": {label: _rows(matrix) for label, matrix in self.overlaps.items()},
        }


def _estimate(result: FisherSpectrum, label: str, name: str, full: bool, kappa: float | None) -> Estimate | None:
    found = result.population
    if found is None:
        return None
    if name == "effective_dimension":
        size = math.inf if result.full.num_params is None else float(result.full.num_params)
        curve = found.effective_dimension
        return dimension_estimate(found.left_out, curve, kappa, num_params=size) if full else None
    estimates = getattr(found, name)
    if isinstance(estimates, BlockEstimates):
        return estimates.full if full else estimates.get(label)
    return estimates if full else None


def _plain(table: Table) -> dict[str, Any]:
    return {label: {metric: dict(row) for metric, row in rows.items()} for label, rows in table.items()}


def _rows(matrix: Float[Tensor, "r r"]) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in matrix.tolist()]


_SHOWN = {"largest": "λ_max", "trace": "trace", "effective_rank": "eff. rank"}


def _sheet(comparison: Comparison) -> Sheet:
    """Of the full matrix, whose label is the last one."""
    label = list(comparison.values)[-1]
    values, ratios = comparison.values[label], comparison.ratios[label]
    rows = []
    for name, result in comparison.results.items():
        numbers = [figure(table[metric][name]) for metric in _SHOWN for table in (values, ratios)]
        rows.append((name, figure(result.full.num_tokens), figure(result.provenance.mean_loss), *numbers))
    first = next(iter(comparison.results.values()))
    return Sheet(
        title=f"{len(rows)} results, full matrix of the {which(first.provenance)}",
        columns=("result", "N", "loss", *(heading for name in _SHOWN.values() for heading in (name, "×"))),
        rows=rows,
        notes=[f"×: over the value of {comparison.names[0]!r}; .values[block][metric][result] has all"],
        lines={name: result.full.eigenvalues.tolist() for name, result in comparison.results.items()},
    )
