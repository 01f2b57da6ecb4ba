"""Memory: how columns are cut into slabs, and that the cut changes nothing."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd_modules import Body, samples
from torch import nn
from zoo import build

import fisherfunc as ff
from fisherfunc.gradients.dense.slabs import TILE, Footprint, cut
from fisherfunc.runtime.memory import SavedBytes


@st.composite
def problems(draw):
    """Tensors, perhaps with fewer columns than parameters, and a footprint."""
    sizes = draw(st.lists(st.integers(1, 5 * TILE), min_size=1, max_size=6))
    num_params = {f"p{i}": size for i, size in enumerate(sizes)}
    sampled = {name: draw(st.integers(0, size)) for name, size in num_params.items()}
    num_columns = sampled if draw(st.booleans()) and any(sampled.values()) else num_params
    footprint = Footprint(
        num_tokens=draw(st.integers(1, 40)),
        itemsize=draw(st.sampled_from([2, 4, 8])),
        gram_itemsize=8,
        graph=draw(st.integers(0, 10**6)),
        largest=max(sizes),
        cotangent=draw(st.integers(0, 10**5)),
    )
    return num_params, num_columns, footprint, draw(st.none() | st.integers(1, 50))


def needed(num_params, num_columns, footprint, chunk_size):
    with pytest.raises(ValueError, match="raise the limit") as caught:
        cut(num_params, num_columns, footprint, memory_limit=0, chunk_size=chunk_size)
    return int(re.search(r"below the (\d+) bytes", str(caught.value)).group(1))


@given(problems(), st.integers(0, 3 * TILE))
def test_a_cut_holds_every_column_once_in_order_within_the_limit(problem, more):
    num_params, num_columns, footprint, chunk_size = problem
    limit = needed(*problem) + footprint.rows(more)
    plan = cut(num_params, num_columns, footprint, memory_limit=limit, chunk_size=chunk_size)
    columns = [c for slab in plan.slabs for c in slab]
    for name, total in num_columns.items():
        bounds = [(c.start, c.stop) for c in columns if c.name == name]
        assert not bounds or (bounds[0][0], bounds[-1][1]) == (0, total)
        assert sum(c.width for c in columns if c.name == name) == total
        assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))
        assert all(start % TILE == 0 for start, _ in bounds)
    assert plan.peak_bytes <= limit
    assert plan.chunk_size <= footprint.num_tokens
    assert chunk_size is None or plan.chunk_size == min(chunk_size, footprint.num_tokens)


@given(problems())
def test_the_bytes_that_the_error_asks_for_are_enough_and_one_less_is_not(problem):
    num_params, num_columns, footprint, chunk_size = problem
    least = needed(*problem)
    plan = cut(num_params, num_columns, footprint, memory_limit=least, chunk_size=chunk_size)
    assert plan.peak_bytes <= least
    with pytest.raises(ValueError, match=f"below the {least} bytes"):
        cut(num_params, num_columns, footprint, memory_limit=least - 1, chunk_size=chunk_size)


class Wide(Body):
    """A tensor of several tiles, and one that is not used at all."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(5, 3000)
        self.unused = nn.Parameter(torch.ones(2 * TILE))

    def between(self, x):
        return x + self.wide(x).tanh().mean(dim=-1, keepdim=True)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"max_coordinates": 9000}])
def test_the_least_memory_gives_the_same_grams_in_more_passes(options):
    torch.manual_seed(0)
    model, batch = Wide().double(), samples()
    fn, loss = ff.functionalize(model), ff.losses.classification()

    def grams(**more):
        return ff.token_grams(fn, fn.params, batch, loss, route="dense", **options, **more)

    with pytest.raises(ValueError, match="memory_limit=1 bytes is below") as caught:
        grams(memory_limit=1)
    least = int(re.search(r"below the (\d+) bytes", str(caught.value)).group(1))
    tight, roomy = grams(memory_limit=least), grams()
    assert tight.metadata["passes"] > roomy.metadata["passes"] == 1
    assert tight.metadata["predicted_peak_bytes"] <= least
    for name, gram in roomy.grams.items():
        torch.testing.assert_close(tight.grams[name], gram, rtol=1e-12, atol=1e-14)


def test_a_small_budget_gives_the_spectrum_of_a_large_one():
    model, batch = build("gpt2", dtype=torch.float64)
    roomy = ff.fisher_spectrum(model, batch, route="dense")
    tight = ff.fisher_spectrum(model, batch, route="dense", memory_limit=500_000)
    assert tight.metadata["passes"] > 3
    for label, spectrum in roomy.blocks.items():
        error = (tight.blocks[label].eigenvalues - spectrum.eigenvalues).abs().max()
        assert error <= 1e-12 * spectrum.eigenvalues[0]


def test_weights_do_not_count_as_memory_that_a_forward_pass_keeps():
    layer, x = nn.Linear(1000, 10), torch.ones(2, 1000, requires_grad=True)

    def forward():
        return layer(x.tanh()).tanh()

    with SavedBytes() as saved:
        output = forward()
    assert output.requires_grad
    assert (saved.total, saved.largest) == (4 * (2 * 1000 + 2 * 10), 4 * 2 * 1000)  # the two outputs of tanh
