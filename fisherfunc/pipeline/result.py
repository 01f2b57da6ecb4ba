"""The result of a run: the spectra of the blocks, of the block-diagonal matrix and of the full matrix."""

from collections.abc import Iterable, Mapping
from typing import Any

from fisherfunc.linalg import metrics
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.records.record import record


@record(static=("metadata",))
class FisherSpectrum:
    """Spectra of F = (1/N) Gᵀ G, by block and as a whole.

    Attributes:
        blocks: The spectrum of each diagonal block of F.
        block_diagonal: The union of the block spectra: the spectrum of F with zero off-diagonal blocks.
        full: The spectrum of F itself.
        metadata: What was computed and how: unit, normalisation, loss, seed, dtype …; plain Python values.
    """

    blocks: Mapping[str, Spectrum]
    block_diagonal: Spectrum
    full: Spectrum
    metadata: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the eigenvalues as plain Python values that survive JSON; what is undefined is None.

        Returns:
            `{"metadata", "per_block": {label: metrics}, "global": metrics of the block-diagonal matrix,
            "full": metrics of the full matrix}`.
        """
        return {
            "metadata": dict(self.metadata),
            "per_block": {label: metrics.summary(spectrum) for label, spectrum in self.blocks.items()},
            "global": metrics.summary(self.block_diagonal),
            "full": metrics.summary(self.full),
        }


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
