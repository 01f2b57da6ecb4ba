"""The spectrum of a block-diagonal matrix, from those of its blocks."""

from collections.abc import Mapping

import torch

from fisherfunc.linalg.spectrum import Spectrum


def union(blocks: Mapping[str, Spectrum]) -> Spectrum:
    """The spectrum of the block-diagonal matrix: all eigenvalues of all blocks, sorted; of stacks, for each.

    Its resolution is that of the coarsest block, its negative part the most negative one.
    """
    spectra = list(blocks.values())
    sizes = [spectrum.num_params for spectrum in spectra]
    return Spectrum(
        eigenvalues=torch.cat([s.eigenvalues for s in spectra], dim=-1).sort(dim=-1, descending=True).values,
        resolution=torch.stack([s.resolution for s in spectra]).amax(dim=0),
        negative_part=torch.stack([s.negative_part for s in spectra]).amin(dim=0),
        num_units=spectra[0].num_units,
        num_params=None if None in sizes else sum(size for size in sizes if size is not None),
        solver=f"union of {len(spectra)} blocks",
        fallback="; ".join(f"{label}: {s.fallback}" for label, s in blocks.items() if s.fallback) or None,
        exact=all(s.exact for s in spectra),
    )
