"""How fast this machine does what a pass is made of: the kernels themselves, on matrices of the plan's own shapes.

Each is repeated for a tenth of a second and the fastest counts; the first run, which allocates, does not, unless it
already took that long.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fisherfunc.gradients.factored.loads import strip_operations
from fisherfunc.linalg.factors.factors import PointFactors, SharedFactors
from fisherfunc.linalg.factors.strips import add_strips, empty_strip
from fisherfunc.linalg.factors.triangle import Term, add_points, add_rows
from fisherfunc.linalg.gram import TILE
from fisherfunc.runtime.clock import clock

BUDGET_S = 0.1
MOST_ROWS = 768
ENTRIES = 2**22
STRIPS = 3


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured on.

    Attributes:
        device: Where.
        dtype: Of factors.
        gram_dtype: Of Grams.
        num_rows: N.
    """

    device: torch.device
    dtype: torch.dtype
    gram_dtype: torch.dtype
    num_rows: int

    @property
    def rows(self) -> int:
        """The rows of a sample."""
        return min(self.num_rows, MOST_ROWS)

    def gram(self, count: int | None = None) -> torch.Tensor:
        """A new Gram of zeros."""
        count = self.rows if count is None else count
        return torch.zeros(count, count, dtype=self.gram_dtype, device=self.device)

    def random(self, *shape: int) -> torch.Tensor:
        """Factors or rows, alike in every run."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return values.to(device=self.device, dtype=self.dtype)


def least_seconds(task: Callable[[], object], device: torch.device, budget: float = BUDGET_S) -> float:
    """The least of repeated runs within a budget."""

    def once() -> float:
        begin = clock(device)
        task()
        return clock(device) - begin

    first = spent = once()
    taken: list[float] = []
    while spent < budget:
        taken.append(once())
        spent += taken[-1]
    return max(min(taken, default=first), 1e-9)


def product_rate(bench: Bench, size: int = 512) -> float:
    """Operations a second of a matrix product."""
    left, out = bench.random(size, size), bench.random(size, size)
    return 2.0 * size**3 / least_seconds(lambda: torch.mm(left, left, out=out), bench.device)


def entry_rate(bench: Bench) -> float:
    """Gram entries a second that are allocated and added to, at next to no operations: what memory allows."""
    rows = bench.random(bench.rows, 1)
    return bench.rows**2 / least_seconds(lambda: add_rows(bench.gram(), rows), bench.device)


def row_rate(bench: Bench, num_params: int) -> float:
    """Operations a second from rows to a Gram, N² p of them, in factored passes."""
    rows = bench.random(bench.rows, min(num_params, TILE))
    gram = bench.gram()
    return float(bench.rows**2) * rows.shape[1] / least_seconds(lambda: add_rows(gram, rows), bench.device)


def point_rate(bench: Bench, d: int, e: int) -> float:
    """Operations a second from points to a Gram, N² (d + e) of them."""
    d, e = min(d, TILE), min(e, TILE)
    points = PointFactors(own=bench.random(bench.rows, d), shared=bench.random(bench.rows, e), axis=0)
    term = Term(points=points, gram=bench.gram())
    spent = least_seconds(lambda: add_points([term]), bench.device)
    return float(bench.rows**2) * (d + e) / spent


def strip_rate(bench: Bench, *, places: int, features: int, others: int, per_sequence: float, causal: bool) -> float:
    """Operations a second of pairwise contractions, as `strip_operations` counts them, on a few sequences.

    Args:
        bench: What is measured on.
        places: S.
        features: d.
        others: Features of the inputs.
        per_sequence: Rows a sequence.
        causal: Whether rows end in mid-sequence.
    """
    count = max(1, min(round(per_sequence), ENTRIES // STRIPS // places))
    features = max(1, min(features, ENTRIES // STRIPS // places // count))
    shared, own = bench.random(places, min(others, TILE)), bench.random(count, places, features)
    strips = []
    for k in range(STRIPS):
        like = SharedFactors(own=own, shared=shared, axis=0)
        strip = empty_strip(slice(k * count, (k + 1) * count), like)
        step = max(1, round(count**0.5)) if causal else count
        for start in range(0, count, step):
            stop = min(start + step, count)
            reach = max(1, places * stop // count) if causal else places
            strip.put(start, own[start:stop, :reach])
        strips.append(strip)
    gram = bench.gram(STRIPS * count)
    done = strip_operations(STRIPS * count, places, features, per_sequence=float(count), causal=causal)
    return done / least_seconds(lambda: add_strips(gram, strips), bench.device, 2 * BUDGET_S)


def tile_rate(bench: Bench, num_params: int) -> float:
    """Operations a second from rows to a Gram in dense passes, 2 N² p of them, in the dtype of Grams."""
    rows = bench.random(bench.rows, min(num_params, TILE)).to(bench.gram_dtype)
    gram = bench.gram()
    return 2.0 * bench.rows**2 * rows.shape[1] / least_seconds(lambda: gram.addmm_(rows, rows.mT), bench.device)
