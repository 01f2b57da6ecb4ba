"""Eigenpairs of a Gram: K u = λN u. Row n weighs u_n in the direction v = Gᵀu/√(λN) of F. Axis order `(k, n)`."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.linalg.grams.token_grams import TokenGrams, Tokens
from fisherfunc.linalg.lifting import gram_kernel, solved
from fisherfunc.records.provenance import Provenance, Traced
from fisherfunc.records.record import record


@record(static=("label",), notes=("provenance",))
class Eigenpairs(Traced):
    """The leading eigenvalues of F, or of one of its blocks, and what each token contributes to them.

    Attributes:
        eigenvalues: λ_k of F, largest first, all above the resolution.
        coefficients: u_k, of norm 1: u_n = ⟨g_n, v⟩/√(λN), so that u_n² is the share of token n in λ; of centred
            Grams ⟨g_n − ḡ, v⟩/√(λN), ḡ the mean row. Its largest entry is positive.
        resolution: What eigenvalues are told from zero above.
        tokens: Which token (or sequence) each entry of u_k is.
        out_of_sample: λ_out,k: what direction k of all other sequences holds of a sequence, per token, and λ_out,k/λ_k
            the share of direction k that exists beyond the sample (see `ff.population.leading_sums`); None where
            nothing can be said of the population, as of fewer than three sequences.
        label: The block.
        provenance: What F this is, and of which Grams.
    """

    eigenvalues: Float[Tensor, " k"]
    coefficients: Float[Tensor, "k n"]
    resolution: Float[Tensor, ""]
    tokens: Tokens
    out_of_sample: Float[Tensor, " k"] | None
    label: str
    provenance: Provenance

    @property
    def beyond_sample(self) -> Float[Tensor, " k"] | None:
        """Return λ_out,k/λ_k: 1 where other sequences have direction k as well, 0 where it is one sequence's own."""
        return None if self.out_of_sample is None else self.out_of_sample / self.eigenvalues


def leading_pairs(
    grams: TokenGrams, names: Iterable[str], *, num: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k n"], Float[Tensor, ""]]:
    """The leading eigenvalues λ of a block of F, the eigenvectors u of its Gram, and the resolution, in float64.

    Cost about 9 N³ operations.

    Args:
        grams: The Grams of a pass.
        names: Those that make up the block.
        num: k.

    Raises:
        ValueError: If fewer than `num` eigenvalues are above the resolution; it says how many are.
    """
    if num < 1:
        raise ValueError(f"num expected at least 1, got num={num}")
    gram = grams.summed(names)
    values, vectors = torch.linalg.eigh(gram.matrix.double())
    found = solved(gram_kernel(lambda _: values.flip(-1), solver="eigh"), gram)
    resolved = int((found.eigenvalues > found.resolution).sum())
    if num > resolved:
        raise ValueError(
            f"num={num} eigenvectors asked for, and {resolved} of {len(found.eigenvalues)} eigenvalues are above the "
            f"resolution {found.resolution.item():.1e}; below it a direction is round-off: ask for fewer, or compute "
            "the Grams in float64"
        )
    u = vectors.flip(-1)[:, :num].mT
    largest = u.gather(1, u.abs().argmax(dim=1, keepdim=True))
    return found.eigenvalues[:num], u * largest.sign(), found.resolution
