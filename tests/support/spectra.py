"""Small spectra with metadata, as the surface gets them."""

from dataclasses import replace
from typing import Any

import torch
from builders import grams_of

from fisherfunc.linalg.kernels import gram_eigh, of_rows
from fisherfunc.linalg.spectrum import Spectrum
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.pipeline.solve import spectrum_of_gradients
from fisherfunc.records.provenance import Provenance

FACTS = {
    "model_id": "tiny/model",
    "fisher": "empirical",
    "unit": "token",
    "loss": "causal_lm",
    "mean_loss": 3.25,
}


def spectrum(
    labels: tuple[str, ...] = ("embedding", "layer.0", "output"),
    *,
    num_tokens: int = 6,
    num_params: int = 9,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    **facts: Any,
) -> FisherSpectrum:
    """The spectrum of random gradients, one block a label, each of another size; all zero where `scale` is 0."""
    generator = torch.Generator().manual_seed(len(labels) + num_tokens)
    gradients = {
        label: scale * torch.randn(num_tokens, num_params + index, generator=generator)
        for index, label in enumerate(labels)
    }
    result = spectrum_of_gradients(
        gradients, blocks=lambda name: name, kernel=of_rows(gram_eigh(dtype=dtype), dtype=dtype)
    )
    return replace(result, provenance=replace(result.provenance, **{**FACTS, **facts}))


def unresolved(result: FisherSpectrum) -> FisherSpectrum:
    """The same with no eigenvalue above its resolution, as of many tokens in bfloat16."""

    def coarse(part: Spectrum) -> Spectrum:
        return replace(part, resolution=4 * part.eigenvalues[0])

    blocks = {label: coarse(part) for label, part in result.blocks.items()}
    return replace(result, blocks=blocks, full=coarse(result.full))


def random_rows(seed, count=6, width=4):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def known_grams(tree, **facts):
    known = {"batch": "one", "loss": "causal_lm", "fisher": "empirical", **facts}
    return replace(grams_of(tree), provenance=Provenance(**known))
