"""All estimates at once: what they hold in memory while they are made."""

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.coverage import population, sample
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.pairs import TILE
from fisherfunc.population.summary import summary_of


class Storages(TorchDispatchMode):
    """Watches what operations inside it allocate, in bytes.

    Attributes:
        largest: The largest of all.
        peak: The most of what lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count the storages that are new."""
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self.living = {key: entry for key, entry in self.living.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(count for _, count in self.living.values()))
        return result


@pytest.mark.parametrize(("num_sequences", "num_tokens"), [(12, 100), (80, 15)])
def test_memory_is_a_few_matrices_of_n_by_n_numbers(num_sequences, num_tokens):
    """Or tiles, where these are larger, and as many of few sequences as of many: 12 matrices would be one for each."""
    of, generator = population("1/k", "gaussian"), torch.Generator().manual_seed(0)
    grams = sample(of, num_sequences=num_sequences, num_tokens=num_tokens, generator=generator)
    gram = grams.block().double()
    found, eigenpairs = clusters_of(grams, None, "it"), torch.linalg.eigh(gram)
    with Storages() as watched:
        summary_of(grams, found, eigenpairs=eigenpairs)
    matrix = max(gram.nbytes, TILE * gram.itemsize)
    assert watched.largest <= matrix and watched.peak <= 6 * matrix
