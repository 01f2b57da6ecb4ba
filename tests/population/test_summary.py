"""All estimates at once: what they hold in memory while they are made, and that every interval is one."""

import json
from typing import Any

import pytest
import torch
from builders import grams_of
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.coverage import population, sample
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.pairs import TILE
from fisherfunc.population.summary import summary, summary_of


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


def intervals(content):
    """Every estimate in plain values."""
    if isinstance(content, dict) and "warning" in content:
        yield content
    elif isinstance(content, dict | list):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from intervals(entry)


@given(
    sizes=st.lists(st.integers(1, 3), min_size=3, max_size=8),
    deviation=st.sampled_from([0, 3, 12, 25]),
    alone=st.booleans(),
    num_params=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_every_interval_has_two_numbers_around_its_point_also_where_one_sequence_is_nearly_all(
    sizes, deviation, alone, num_params, seed
):
    """Norms up to e^±50: as of samples that are fitted, or not at all. JSON has no infinities."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    norms = (deviation * torch.randn(len(sequence), 1, generator=generator, dtype=torch.float64)).exp()
    norms *= (sequence == 0)[:, None] if alone else 1
    rows = torch.randn(2, len(sequence), num_params, generator=generator, dtype=torch.float64) * norms
    found = summary(grams_of({"h.0.w": rows[0], "h.1.w": rows[1]}, sequence=sequence)).to_dict()
    assert json.dumps(found, allow_nan=False)
    for entry in intervals(found):
        assert 0 <= entry["low"] <= entry["high"]
        assert entry["estimate"] is None or entry["low"] <= entry["estimate"] <= entry["high"]
    ratios = [found["participation_ratio"]["full"], found["effective_rank"]]
    assert all(entry["low"] * (1 + 1e-9) >= 1 and entry["high"] <= 2 * num_params for entry in ratios)
    assert all(e["high"] <= 1 for e in [found["block_diagonal_error"], *intervals(found["coupling"]["alignment"])])
    assert all(entry["high"] <= 2 * num_params for entry in found["effective_dimension"]["estimates"])
