"""The spectrum of one Fisher matrix F = (1/N) Gᵀ G, as a record."""

from jaxtyping import Float
from torch import Tensor

from fisherfunc.records.record import record
from fisherfunc.records.sheet import Sheet, as_html, as_text, figure, number_of


@record(static=("num_units", "num_params", "solver", "fallback", "exact"))
class Spectrum:
    """Eigenvalues of F = (1/N) Gᵀ G, largest first; those beyond min(n, P) are zero and left out, for n rows of G.

    Attributes:
        eigenvalues: The min(n, P) leading eigenvalues of F, in descending order, none negative.
        resolution: Eigenvalues below this are not told from zero. Of a pass whose round-off was measured, no eigenvalue
            is off by more, as far as eight rows and the check of all show (gradients/checks/round_off.py). Else it is
            (n · eps + √P · eps') · λ_max, with eps that of the dtype in which the gradients were computed and eps' that
            of the sums over P, which neither bounds nor estimates an error; where rows were centred or summed, with the
            norm before that in place of λ_max. Of rows as given: what rounding them makes of zero (linalg/lifting.py).
        negative_part: The most negative eigenvalue before round-off was set to zero; 0 where there was none.
        num_units: N, what the Gram was divided by; n, but where a token has several targets (targets.py).
        num_params: P, or None where only a Gram was given.
        solver: What computed the eigenvalues.
        fallback: Why an earlier solver was given up, or None.
        exact: False for a marked approximation.
    """

    eigenvalues: Float[Tensor, "*stack k"]
    resolution: Float[Tensor, "*stack"]
    negative_part: Float[Tensor, "*stack"]
    num_units: int
    num_params: int | None
    solver: str
    fallback: str | None = None
    exact: bool = True

    @property
    def num_tokens(self) -> int:
        """The same as `num_units`, by the name that it had before: of rows of other units not a number of tokens."""
        return self.num_units

    def __repr__(self) -> str:
        """Show it in two lines."""
        return as_text(_sheet(self))

    def _repr_html_(self) -> str:
        """Show it in a notebook, with a plot."""
        return as_html(_sheet(self))


def _sheet(spectrum: Spectrum) -> Sheet:
    values, floor = spectrum.eigenvalues, number_of(spectrum.resolution)
    count, size = f"N = {spectrum.num_units}", f"P = {spectrum.num_params or 'unknown'}"
    if floor is None or values.ndim != 1:  # a stack of them, or under vmap
        shape = tuple(getattr(values, "shape", ()))
        return Sheet(title=f"Spectra of F, eigenvalues of shape {shape}, {count}, {size}, by {spectrum.solver}")
    resolved = values[values > floor].tolist()
    leading = ", ".join(f"λ_{k} {figure(value)}" for k, value in enumerate(values[:3].tolist(), start=1))
    how = "exact" if spectrum.exact else "approximate"
    return Sheet(
        title=f"Spectrum of F: {len(values)} eigenvalues, {count}, {size}",
        notes=[
            f"{leading}, trace {figure(values.sum().item())}; {len(resolved)} above the resolution {figure(floor)}",
            f"{how}, by {spectrum.solver}" + (f" after {spectrum.fallback}" if spectrum.fallback else ""),
        ],
        lines={"F": resolved},
    )
