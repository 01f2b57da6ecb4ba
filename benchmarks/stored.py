"""A Gram of 40,000 rows in a file: its leading eigenvalues, and the density of all: `python -m benchmarks.stored`.

Rows are synthetic, X of rank r with columns of standard deviation k^-½, so that the eigenvalues of K/N = X Xᵀ/N are
those of the r × r matrix XᵀX/N, which are at hand to hold everything against. With `--model` they are the gradients of
a small network of P parameters, the Gram is made by pairs of passes within `--memory`, and what it is held against is
the P × P matrix of gradients in float64 by vmap. Leading eigenvalues are found with one and with several vectors to a
read of the file, which is deleted at the end.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

import fisherfunc as ff
from benchmarks.process import peak_memory, settled_memory

CPU = torch.device("cpu")
BINS = 6
"""Of the density, from a thousandth of λ_max on."""


def main() -> None:
    """Write a Gram, find its leading eigenvalues and its density, and print how far they are off and what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rank", type=int, default=1000)
    parser.add_argument("--leading", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--widths", type=int, nargs="*", default=[1, 4, 8], help="vectors to a read")
    parser.add_argument("--probes", type=int, default=8, help="of the density")
    parser.add_argument("--steps", type=int, default=40, help="from each probe")
    parser.add_argument("--model", action="store_true", help="rows of a model, by pairs of passes")
    parser.add_argument("--memory", type=float, default=4.0, help="what these passes may take, in GB")
    parser.add_argument("--folder", type=Path, help="where the file lies; that of temporary files by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "gram")
        if options.model:
            gram, exact, reference = _of_a_model(path, options.rows, options.memory)
        else:
            gram, exact, reference = _of_features(path, options.rows, options.rank)
        for width in options.widths:
            solve = ff.kernels.lanczos(num_leading=options.leading, tolerance=options.tolerance, width=width)
            found = _took(f"{options.leading} leading eigenvalues, width {width}", gram, solve, reference)
            off = (found.eigenvalues - exact[: len(found.eigenvalues)]).abs()
            worst = float((found.residuals / found.eigenvalues).max())
            print(
                f"  residuals up to {worst:.1e} of an eigenvalue; off by {float(off.max()):.1e} at the most; all within"
                f" their bounds, up to {float(found.bounds.max()):.1e}: {bool((off <= found.bounds).all())}",
                flush=True,
            )
        estimate = ff.kernels.lanczos_quadrature(num_probes=options.probes, num_steps=options.steps)
        _density(_took(f"density, {options.probes} probes of {options.steps} steps", gram, estimate), exact)
    operator = gram.operator()
    print(f"trace {operator.trace:.12g}, exact {float(exact.sum()):.12g}")
    print(f"‖F‖² {operator.squared_norm:.12g}, exact {float(exact.square().sum()):.12g}")


Known = tuple[ff.operators.StoredGram, Tensor, ff.operators.TokenOperator | None]
"""A Gram, its exact eigenvalues, and what bounds are held against, where that is not the Gram itself."""


def _of_features(path: Path, num_rows: int, rank: int) -> Known:
    rows = torch.randn(num_rows, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows *= torch.arange(1, rank + 1, dtype=torch.float64) ** -0.5
    gram = _written(
        path, lambda: ff.operators.stored_gram(path, lambda a, b: rows[a:b] @ rows[:b].mT, num_rows=num_rows)
    )
    return gram, torch.linalg.eigvalsh(rows.mT @ rows / num_rows).flip(0), None


def _of_a_model(path: Path, num_rows: int, memory: float) -> Known:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 10))
    batch = (torch.randn(num_rows, 64) * torch.arange(1, 65) ** -0.5, torch.randint(10, (num_rows,)))
    fn, loss = ff.functionalize(model), ff.losses.classification()
    limit = int(memory * 1e9)
    gram = _written(path, lambda: ff.operators.fisher_gram(path, fn, fn.params, batch, loss, memory_limit=limit))
    reference = ff.operators.fisher(fn, fn.params, batch, loss)
    return gram, _eigenvalues(model, *batch), reference


def _eigenvalues(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Those of the P × P matrix, by gradients in float64 that are formed a thousand at a time."""
    params = {name: p.detach().double() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y)

    total = torch.zeros(())
    for x, y in zip(inputs.double().split(1000), targets.split(1000), strict=True):
        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
        rows = torch.cat([gradient.flatten(1) for gradient in each.values()], dim=1)
        total = total + rows.mT @ rows
    return torch.linalg.eigvalsh(total / len(inputs)).flip(0)


def _written(path: Path, write: Callable[[], ff.operators.StoredGram]) -> ff.operators.StoredGram:
    before, begin, wall = settled_memory(CPU), process_time(), perf_counter()
    gram = write()
    took, waited, held = process_time() - begin, perf_counter() - wall, peak_memory(CPU) - before
    size = path.stat().st_size / 1e9
    print(
        f"{size:.1f} GB written in {took:.0f} s of processor time ({waited:.0f} s in all), {_megabytes(held)}",
        flush=True,
    )
    return gram


def _took(
    what: str,
    gram: ff.operators.StoredGram,
    solve: Callable[[Any], Any],
    reference: ff.operators.TokenOperator | None = None,
) -> Any:
    reads = 0

    def product(vectors: Tensor) -> Tensor:
        nonlocal reads
        reads += 1
        return gram.matmul(vectors) / gram.num_tokens

    operator = replace(gram.operator(reference), block_product=product)
    if reference is None:
        operator = replace(operator, reference_product=lambda u: product(u[:, None])[:, 0])
    before, begin, wall = settled_memory(CPU), process_time(), perf_counter()
    found = solve(operator)
    took, waited, held = process_time() - begin, perf_counter() - wall, peak_memory(CPU) - before
    print(f"{what}: {found.num_products} products in {reads} reads, {took:.0f} s of processor time", end="")
    print(f" ({waited:.0f} s in all; {took / reads:.1f} s a read), {_megabytes(held)}")
    return found


def _density(found: ff.operators.SpectralQuadrature, exact: Tensor) -> None:
    largest = float(exact[0])
    edges = (1.01 * largest * 10.0 ** torch.linspace(-3, 0, BINS + 1, dtype=torch.float64)).tolist()
    shown = {}
    for one, (low, high) in zip(found.density(torch.tensor(edges, dtype=torch.float64)), pairwise(edges), strict=True):
        shown[f"eigenvalues in ({low:.3g}, {high:.3g}]"] = one, int(((exact > low) & (exact <= high)).sum())
    shares = exact.clamp(min=0) / exact.sum()
    shown["effective rank"] = found.effective_rank(), float(torch.special.entr(shares).sum().exp())
    for gamma in (0.1 * largest, 0.01 * largest, 0.001 * largest):
        dimension = float((exact / (exact + gamma)).sum())
        shown[f"effective dimension at {gamma:.3g}"] = found.effective_dimension(gamma), dimension
    for name, (one, number) in shown.items():
        errors = f"quadrature {one.quadrature_error:.2g}, probes {one.standard_error:.2g}"
        inside = "inside" if one.low <= number <= one.high else "OUTSIDE"
        print(f"  {name}: {one.value:.4g}, {one.low:.4g} to {one.high:.4g} ({errors}); exact {number:.4g}, {inside}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB at the peak"


if __name__ == "__main__":
    main()
