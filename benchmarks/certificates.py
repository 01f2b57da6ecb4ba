"""Generated cases, in which what Lanczos certifies is held against the known spectrum.

`python -m benchmarks.certificates --cases 10000` takes about a minute.

A case is a positive semidefinite matrix with a spectrum of one of six kinds (spread, a power law, multiplicities, ten
orders of magnitude, low rank, clusters), products in float64 or float32, of one vector or several together, and options
drawn at random. What is held:

- an eigenvalue lies within the bound of each that is given;
- the k-th largest is no smaller than the k-th given, less the round-off;
- none is larger than `missed` but those that are accounted for, where `complete` says so;
- f of the matrix, for the very probes drawn, lies within the bounds of the quadrature.

What is allowed beyond is the rounding of the oracle: n eps λ_max, of eigenvalues and of sums over them.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisherfunc.linalg.kernels import lanczos, lanczos_quadrature
from fisherfunc.linalg.krylov.lanczos import LeadingEigenvalues
from fisherfunc.linalg.krylov.quadrature import SpectralQuadrature, probe_vector
from fisherfunc.linalg.krylov.token_operator import TokenOperator, gram_operator

EPS = torch.finfo(torch.float64).eps
MOST_ROWS = 40
KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "spread": lambda n, g: torch.rand(n, generator=g, dtype=torch.float64),
    "power law": lambda n, g: torch.arange(1, n + 1, dtype=torch.float64) ** -1.5,
    "multiplicities": lambda n, g: torch.randint(0, 3, (n,), generator=g).double(),
    "ten orders": lambda n, g: 10.0 ** (-10 * torch.rand(n, generator=g, dtype=torch.float64)),
    "low rank": lambda n, g: torch.cat([torch.rand(2, generator=g, dtype=torch.float64), torch.zeros(n)])[:n],
    "clusters": lambda n, g: torch.randint(1, 3, (n,), generator=g) + 1e-7 * torch.rand(n, generator=g).double(),
}
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "effective dimension": lambda x: x / (x + 0.1),
    "log det": lambda x: torch.log1p(x / 0.1),
    "entropy": torch.special.entr,
}


@dataclass(frozen=True)
class Case:
    """A matrix Q diag(λ) Qᵀ as an operator, with its spectrum."""

    kind: str
    single: bool
    values: Tensor
    vectors: Tensor
    operator: TokenOperator

    @property
    def size(self) -> int:
        """How many rows."""
        return len(self.values)

    @property
    def rounding(self) -> float:
        """What the oracle may be off by."""
        return self.size * EPS * max(float(self.values.max()), 1e-300)


def case_of(seed: int) -> Case:
    """Draw a case: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    size = int(torch.randint(1, MOST_ROWS, (), generator=generator))
    values = KINDS[kind](size, generator)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = (vectors * values) @ vectors.mT
    operator, single = gram_operator((matrix + matrix.mT) / 2, num_tokens=1), seed % 2 == 1
    if single:
        narrow = matrix.float()
        operator = replace(operator, token_product=lambda u: (narrow @ u.float()).double())
    if seed % 3 == 0:
        one = operator.token_product
        operator = replace(operator, block_product=lambda us: torch.stack([one(u) for u in us.mT], dim=1))
    return Case(kind=kind, single=single, values=values, vectors=vectors, operator=operator)


def failures(seed: int) -> list[str]:
    """What of a case does not hold, in words; nothing where all does."""
    case = case_of(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    num_leading = int(torch.randint(1, 9, (), generator=generator))
    num_steps = num_leading + int(torch.randint(0, 20, (), generator=generator))
    width = int(torch.randint(1, 5, (), generator=generator))
    options = {"num_leading": num_leading, "num_steps": num_steps, "width": width}
    found = lanczos(tolerance=1e-3, seed=seed, **options)(case.operator)
    num_probe_steps = int(torch.randint(2, 9, (), generator=generator))
    sums = lanczos_quadrature(num_probes=2, num_steps=num_probe_steps, seed=seed)(case.operator)
    what = f"case {seed}, {case.kind}, {case.size} rows{', float32' if case.single else ''}"
    return [f"{what}: {wrong}" for wrong in [*_of_eigenvalues(case, found), *_of_sums(case, sums, seed)]]


def _of_eigenvalues(case: Case, found: LeadingEigenvalues) -> list[str]:
    true = case.values.sort(descending=True).values
    wrong = []
    nearest = (found.eigenvalues[:, None] - true).abs().min(dim=1).values
    if bool((nearest > found.bounds + case.rounding).any()):
        wrong.append(f"an eigenvalue is off by {nearest.tolist()}, certified to {found.bounds.tolist()}")
    if bool((true[: len(found.eigenvalues)] < found.eigenvalues - found.round_off - case.rounding).any()):
        wrong.append(f"{found.eigenvalues.tolist()} are above {true.tolist()} by more than the round-off")
    off = (true[: len(found.eigenvalues)] - found.eigenvalues).abs()
    if found.complete and bool((off > torch.linalg.vector_norm(found.bounds) + case.rounding).any()):
        wrong.append(f"said to be complete, and {found.eigenvalues.tolist()} are not the first of {true.tolist()}")
    return wrong


def _of_sums(case: Case, found: SpectralQuadrature, seed: int) -> list[str]:
    wrong = []
    for probe in range(len(found.rules)):
        shares = (probe_vector(case.size, seed, probe) @ case.vectors).square()
        for name, function in SUMS.items():
            value, allowed = float((function(case.values) * shares).sum()), found.rounding(function)
            low, high = found.bounds(function)[probe]
            allowed += case.size * EPS * max(abs(value), case.size)
            if not low - allowed <= value <= high + allowed:
                wrong.append(f"{name} is {value!r}, bounded by {low!r} and {high!r} up to {allowed:.1e}")
    return wrong


def main() -> int:
    """Run cases; return how many failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for seed in range(options.first, options.first + options.cases):
        for line in failures(seed):
            wrong += 1
            print(line)
    print(f"{options.cases} cases, {wrong} statements that do not hold")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
