"""A Gram of 40,000 rows in a file, and its leading eigenvalues: `python -m benchmarks.stored`, `--help` for options.

Rows are synthetic, X of rank r with columns of standard deviation k^-½, so that the eigenvalues of K/N = X Xᵀ/N are
those of the r × r matrix XᵀX/N, which are at hand to hold everything against. The file is deleted at the end.
"""

import argparse
import tempfile
from pathlib import Path
from time import process_time

import torch

import fisherfunc as ff


def main() -> None:
    """Write a Gram, find its leading eigenvalues and sums, and print how far they are off and what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--leading", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the file lies; that of temporary files by default")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(options.rows, options.rank, generator=generator, dtype=torch.float64)
    rows *= torch.arange(1, options.rank + 1, dtype=torch.float64) ** -0.5
    exact = torch.linalg.eigvalsh(rows.mT @ rows / options.rows).flip(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        begin = process_time()
        gram = ff.operators.stored_gram(
            Path(folder, "gram"), lambda start, stop: rows[start:stop] @ rows[:stop].mT, num_rows=options.rows
        )
        written = process_time()
        print(
            f"{gram.path.stat().st_size / 1e9:.1f} GB written in {written - begin:.0f} s of processor time", flush=True
        )
        found = ff.kernels.lanczos(num_leading=options.leading, tolerance=1e-3)(gram.operator())
        took = process_time() - written
    print(f"{found.num_products} products, {took / found.num_products:.1f} s of processor time each")
    operator = gram.operator()
    print(f"trace {operator.trace:.9g}, exact {float(exact.sum()):.9g}")
    print(f"‖F‖² {operator.squared_norm:.9g}, exact {float(exact.square().sum()):.9g}")
    print(f"certified that none was missed: {found.complete}; no other is above {float(found.missed):.4g}")
    for value, bound, want in zip(found.eigenvalues.tolist(), found.bounds.tolist(), exact.tolist(), strict=False):
        print(f"λ {value:.9g}, within {bound:.1e}, off by {abs(value - want):.1e}")


if __name__ == "__main__":
    main()
