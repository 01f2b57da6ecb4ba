"""The result of a run: the spectra of the blocks, of the block-diagonal matrix and of the full matrix."""

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from fisherfunc.linalg import metrics
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.sheets import eigenvalue_dataset, eigenvalue_frame, latex, metric_frame, result_sheet
from fisherfunc.population.summary import PopulationSummary
from fisherfunc.records.provenance import Provenance, Traced
from fisherfunc.records.record import record
from fisherfunc.records.sheet import Sheet, as_html, as_text
from fisherfunc.statistics.coupling import BlockCoupling
from fisherfunc.statistics.resampling.interval import Intervals
from fisherfunc.statistics.sample_limits import SampleLimits, sample_limits


@record(static=("provenance", "coupling", "intervals", "population"))
class FisherSpectrum(Traced):
    """Spectra of F = (1/N) Gᵀ G, by block and as a whole.

    Attributes:
        blocks: The spectrum of each diagonal block of F.
        block_diagonal: The union of the block spectra: the spectrum of F with zero off-diagonal blocks.
        full: The spectrum of F itself.
        provenance: What was computed and how: unit, normalisation, loss, seed, dtype …; `metadata` has it as plain
            Python values.
        coupling: How the blocks hang together; None where there were no Grams, as of gradients at hand.
        intervals: Confidence intervals of the metrics; None where not asked for.
        population: What the sample says of the population that its sequences were drawn from; None where not asked for,
            or where nothing can be said (`provenance.population` has the reason).
    """

    blocks: Mapping[str, Spectrum]
    block_diagonal: Spectrum
    full: Spectrum
    provenance: Provenance
    coupling: BlockCoupling | None = None
    intervals: Intervals | None = None
    population: PopulationSummary | None = None

    def __repr__(self) -> str:
        """Show it on one screen: a row per matrix."""
        return as_text(self._sheet())

    def _repr_html_(self) -> str:
        """Show it in a notebook: the table, and a plot."""
        return as_html(self._sheet())

    @property
    def matrices(self) -> dict[str, Spectrum]:
        """{label: spectrum}: the blocks, `block_diagonal` and `full` (in parentheses where a block is called that)."""
        whole = {"block_diagonal": self.block_diagonal, "full": self.full}
        return {**self.blocks, **{apart_from(self.blocks, name): spectrum for name, spectrum in whole.items()}}

    def to_dataframe(self, of: str = "metrics") -> Any:
        """Return a tidy pandas DataFrame, of `matrices` in their order.

        Args:
            of: "metrics": a row per matrix; "eigenvalues": a row per eigenvalue, with rank and whether resolved.

        Raises:
            ValueError: If `of` is neither.
            ImportError: If pandas is not installed.
        """
        frames = {"metrics": metric_frame, "eigenvalues": eigenvalue_frame}
        if of not in frames:
            raise ValueError(f"to_dataframe expected of= one of {list(frames)}, got of={of!r}")
        return frames[of](self.matrices)

    def to_xarray(self) -> Any:
        """Return an xarray Dataset of `matrices`: eigenvalues by (block, rank), NaN where there are fewer, and metrics.

        Raises:
            ImportError: If xarray is not installed.
        """
        return eigenvalue_dataset(self.matrices, self.provenance)

    def to_latex(self) -> str:
        """Return the table of the matrices as LaTeX, for the package booktabs."""
        return latex(self._sheet(), num_whole=2)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page that needs nothing else: what was measured, tables, plots, warnings, and how to repeat it.

        The page is made by the layer that writes files, which is above this one: it is imported by name.

        Args:
            path: The file.

        Raises:
            ImportError: If Jinja2 is not installed.
            OSError: If the file cannot be written.
        """
        import_module("fisherfunc.surface.reports.html_report").save_html({"": self}, path)

    def _sheet(self) -> Sheet:
        return result_sheet(self.matrices, self.provenance, self.population)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the eigenvalues as plain Python values that survive JSON; what is undefined is None.

        Returns:
            `{"metadata", "per_block": {label: metrics}, "global": metrics of the block-diagonal matrix,
            "full": metrics of the full matrix, "sample_limits": {"per_block", "full"}, "couplings", "intervals",
            "population"}`; the last three are None where the result has none.
        """
        limits = {label: limits_of(self, spectrum).to_dict() for label, spectrum in self.blocks.items()}
        return {
            "metadata": self.metadata,
            "per_block": {label: metrics.summary(spectrum) for label, spectrum in self.blocks.items()},
            "global": metrics.summary(self.block_diagonal),
            "full": metrics.summary(self.full),
            "sample_limits": {"per_block": limits, "full": limits_of(self, self.full).to_dict()},
            "couplings": None if self.coupling is None else self.coupling.to_dict(),
            "intervals": None if self.intervals is None else self.intervals.to_dict(),
            "population": None if self.population is None else self.population.to_dict(),
        }


def limits_of(result: FisherSpectrum, spectrum: Spectrum) -> SampleLimits:
    """What the sample of a result can show of one of its spectra, but the block-diagonal one."""
    known = None
    if result.population is not None:
        norms = result.population.squared_norm
        label = next((label for label, block in result.blocks.items() if block is spectrum), None)
        known = (norms.full if label is None else norms[label]).estimate
    return sample_limits(spectrum, centered=bool(result.provenance.centered), squared_norm=known)


def apart_from(labels: Iterable[str], name: str) -> str:
    """The name of a whole matrix beside its blocks: in parentheses where a block is called that.

    Example:
        >>> apart_from(["layer.0"], "full"), apart_from(["full"], "full")
        ('full', '(full)')
    """
    taken = set(labels)
    while name in taken:
        name = f"({name})"
    return name
