"""`python -m benchmarks.coverage [--samples R] [--sequences S...] [--tokens T] [--moments] …`, see `--help`.

How often the intervals of `ff.population` hold the truth, by simulation from known populations; a table in Markdown.

A population is a spectrum of P eigenvalues in four coupled blocks, tokens that depend on each other within a sequence,
and a distribution of norms:

    g_st = √ν_st Q (√λ ∘ (√ρ u_s + √(1−ρ) e_st)),   u, e standard normal, E ν = 1,   so that  F = Q diag(λ) Qᵀ

Q mixes the four eigenvalues of each place by a Hadamard matrix, so that blocks are coupled, and any P costs N P.
`--paired` simulates the paired intervals of comparisons in place of these: the same draws, two spectra. `--moments`
has second moments and their ratios alone, which need no eigensolve, so that many more samples are drawn in a minute.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from fisherfunc.linalg.gram import gram_of
from fisherfunc.linalg.grams.token_grams import TokenGrams, Tokens
from fisherfunc.population import Estimate, summary
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.dimension import dimension_of
from fisherfunc.population.paired import LeftOut, left_out, paired_dimension, paired_ratio
from fisherfunc.population.pairs import full_of, second_moments_of
from fisherfunc.population.second_moments import (
    coupling_estimate,
    error_estimate,
    participation_ratio_of,
    squared_norm_of,
    trace_of,
)
from fisherfunc.records.provenance import Provenance
from fisherfunc.statistics.block_grams import gathered

NUM_BLOCKS = 4
MIXING = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
CORRELATION = 0.3
REFERENCE = "1/k"
SPECTRA = ("flat", "1/k", "1/k^2", "spiked", "model")
NORMS = ("gaussian", "heavy")
LOG_NORMS = (
    *(-12.2, -8.13, -6.82, -6.01, -4.28, -3.56, -2.68, -2.09, -1.64, -1.38, -1.06, -0.82, -0.69, -0.64, -0.57, -0.53),
    *(-0.45, -0.36, -0.28, -0.21, -0.14, -0.08, -0.01, 0.06, 0.13, 0.22, 0.3, 0.43, 0.56, 0.72, 0.95, 1.53, 2.56),
)
"""Quantiles, evenly spaced, of log(‖g‖²/mean) of 504 tokens of the embedded model on its text."""
HOLDS, BRACKET_HOLDS, HOLDS_AT_MOST = 0.90, 0.88, 0.99
BRACKETS = ("leading eigenvalue", "three leading", "effective rank")
DAMPINGS = (0.1, 0.01, 0.001)
BIAS = {"gaussian": 0.05, "heavy": 0.08}


@dataclass(frozen=True)
class Population:
    """A spectrum, in columns of what is mixed, and how norms are distributed."""

    eigenvalues: Tensor
    norms: str

    @property
    def num_params(self) -> int:
        return self.eigenvalues.numel()

    def dimension(self, kappa: float) -> float:
        return float((self.eigenvalues / (self.eigenvalues + kappa)).sum())

    def truths(self) -> dict[str, float]:
        """What is estimated of it."""
        values = self.eigenvalues.flatten().sort(descending=True).values
        trace, square = float(values.sum()), float(values.square().sum())
        own = NUM_BLOCKS * float(self.eigenvalues.mean(dim=1).square().sum())  # a block's is the mean at each place
        between = torch.einsum("pc,c->p", self.eigenvalues, MIXING[0] * MIXING[1]).square().sum()
        shares = values / trace
        return {
            "trace": trace,
            "squared norm": square,
            "participation ratio": trace**2 / square,
            "block-diagonal error": math.sqrt(max(1 - own / square, 0.0)),
            "alignment": float(between) * NUM_BLOCKS / own,
            "leading eigenvalue": float(values[0]),
            "three leading": float(values[:3].sum()),
            "effective rank": math.exp(-float((shares * shares.log()).sum())),
            **{f"dimension at {share:g} λ₁": self.dimension(share * float(values[0])) for share in DAMPINGS},
        }


def population(spectrum: str, norms: str, num_params: int = 320) -> Population:
    """One of `SPECTRA`; "model" has P = 12,000 and the norms of real tokens, whatever the others are."""
    count = 12_000 if spectrum == "model" else num_params
    k = torch.arange(1, count + 1, dtype=torch.float64)
    values = {
        "flat": torch.ones_like(k),
        "1/k": 1 / k,
        "1/k^2": k**-2,
        "spiked": torch.where(k <= 4, 50 / k**1.5, 0.2),
        "model": (k + 5) ** -0.8,
    }[spectrum]
    return Population(values.reshape(NUM_BLOCKS, -1).mT, "real" if spectrum == "model" else norms)


def sample(of: Population, *, num_sequences: int, num_tokens: int, generator: torch.Generator) -> TokenGrams:
    """The Grams of one sample, one a block."""

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def dependent(*shape: int) -> Tensor:
        shared, own = gaussian(num_sequences, 1, *shape), gaussian(num_sequences, num_tokens, *shape)
        return (CORRELATION**0.5 * shared + (1 - CORRELATION) ** 0.5 * own).flatten(0, 1)

    rows = (dependent(*of.eigenvalues.shape) * of.eigenvalues.sqrt()) @ MIXING
    rows *= _squared_norms(of.norms, dependent()).sqrt()[:, None, None]
    index = torch.arange(len(rows))
    return TokenGrams(
        grams={f"h.{a}.weight": gram_of(rows[:, :, a]) for a in range(NUM_BLOCKS)},
        tokens=Tokens(sequence=index // num_tokens, position=index % num_tokens, loss=rows.new_zeros(len(rows))),
        scale={},
        num_params={f"h.{a}.weight": len(of.eigenvalues) for a in range(NUM_BLOCKS)},
        unit="token",
        centered=False,
        precision=torch.float64,
        provenance=Provenance(),
    )


def _squared_norms(kind: str, scores: Tensor) -> Tensor:
    """ν of mean one, from standard normal scores."""
    if kind == "gaussian":
        return torch.ones_like(scores)
    if kind == "heavy":  # a lognormal whose logarithm has a standard deviation of 1.5
        return (1.5 * scores - 1.5**2 / 2).exp()
    quantiles = torch.tensor(LOG_NORMS, dtype=torch.float64)

    def at(place: Tensor) -> Tensor:
        place = place * (len(quantiles) - 1)
        left = place.long().clamp(max=len(quantiles) - 2)
        return (quantiles[left] + (place - left) * (quantiles[left + 1] - quantiles[left])).exp()

    return at(torch.special.ndtr(scores)) / at(torch.linspace(0, 1, 100_001, dtype=torch.float64)).mean()


def estimates(grams: TokenGrams, of: Population) -> dict[str, Estimate]:
    """Those of `Population.truths`, by its names."""
    shares = sorted(DAMPINGS)
    found = summary(grams, num_leading=3, kappas=[share * float(of.eigenvalues.max()) for share in shares])
    return {
        "trace": found.trace.full,
        "squared norm": found.squared_norm.full,
        "participation ratio": found.participation_ratio.full,
        "block-diagonal error": found.block_diagonal_error,
        "alignment": found.coupling.alignment[0][1],
        "leading eigenvalue": found.leading_eigenvalue,
        "three leading": found.leading_sums.sums[2],
        "effective rank": found.effective_rank,
        **{
            f"dimension at {share:g} λ₁": e
            for share, e in zip(shares, found.effective_dimension.estimates, strict=True)
        },
    }


def second_moments(grams: TokenGrams, of: Population) -> dict[str, Estimate]:
    """Those of `estimates` that need no eigensolve; `of` is that of which they are."""
    clusters = clusters_of(grams, None, "second moments")
    found = second_moments_of(grams, gathered(grams, None), clusters)
    full, level = full_of(found), 0.95
    return {
        "trace": trace_of(full, 0, level),
        "squared norm": squared_norm_of(full, 0, level),
        "participation ratio": participation_ratio_of(full, 0, level),
        "block-diagonal error": error_estimate(found.products, level),
        "alignment": coupling_estimate(found, level).alignment[0][1],
    }


@dataclass(frozen=True)
class Cell:
    """How one estimator did on one population.

    Attributes:
        truth: Of the population.
        printed: The share of samples whose interval had no warning (of the effective rank: all, as it has no point).
        held: The share of those whose interval held the truth.
        held_all: The share of all samples whose interval did.
        bias: The mean of printed points over the truth, less one; where the truth is zero, their mean. None without.
        num_samples: How many.
        seed: Of these; of several that are pooled, the first.
    """

    spectrum: str
    norms: str
    num_sequences: int
    name: str
    truth: float
    printed: float
    held: float | None
    held_all: float
    bias: float | None
    num_samples: int
    seed: int = 0

    @property
    def is_printed(self) -> bool:
        """Whether most samples print an interval: of fewer the warning has spoken."""
        return self.held is not None and self.printed >= 0.5

    @property
    def falls_short(self) -> bool:
        """Whether the intervals that are printed do not hold what they promise."""
        least = BRACKET_HOLDS if self.name in BRACKETS else HOLDS
        return self.is_printed and (self.held or 0.0) < least

    @property
    def is_wide(self) -> bool:
        """Whether intervals around points hold more than they say, and the truth is not at an end of the range."""
        at_an_end = self.truth == 0 or (self.name, self.spectrum) == ("participation ratio", "flat")
        return self.is_printed and self.name not in BRACKETS and not at_an_end and (self.held or 0.0) > HOLDS_AT_MOST

    @property
    def is_biased(self) -> bool:
        """Whether the points, of 20 sequences or more, are off by more than they may.

        Not where the truth is zero: what cannot be negative is above it on average.
        """
        off = abs(self.bias or 0.0) if self.truth > 0 else 0.0
        return self.is_printed and self.num_sequences >= 20 and off > BIAS.get(self.norms, 0.08)


def measure(
    spectrum: str,
    norms: str,
    num_sequences: int,
    num_tokens: int,
    num_samples: int,
    seed: int,
    of_sample: Callable[[TokenGrams, Population], dict[str, Estimate]] = estimates,
) -> list[Cell]:
    """All estimators on one population, or those of `second_moments`."""
    of = population(spectrum, norms)
    generator = torch.Generator().manual_seed(crc32(f"{seed} {spectrum} {of.norms} {num_sequences}".encode()))
    size = {"num_sequences": num_sequences, "num_tokens": num_tokens, "generator": generator}
    found = [of_sample(sample(of, **size), of) for _ in range(num_samples)]
    truths = of.truths()
    return [
        _cell((spectrum, of.norms, num_sequences, name), truths[name], [each[name] for each in found])
        for name in found[0]
    ]


RATIOS = {
    "trace": "ratio of traces",
    "participation_ratio": "ratio of participation ratios",
    "block_diagonal_error": "ratio of block-diagonal errors",
}


def measure_paired(
    spectrum: str, norms: str, num_sequences: int, num_tokens: int, num_samples: int, seed: int
) -> list[Cell]:
    """Ratios to the population `REFERENCE` of the same draws."""
    pair = population(spectrum, norms), population(REFERENCE, norms)
    kappa = DAMPINGS[0] * max(float(of.eigenvalues.max()) for of in pair)
    found: dict[str, list[Estimate]] = {name: [] for name in RATIOS}
    dimensions: list[Estimate | None] = []
    for n in range(num_samples):
        drawn = crc32(f"{seed} {norms} {num_sequences} {n}".encode())
        size = {"num_sequences": num_sequences, "num_tokens": num_tokens}
        left = [_left_out(sample(of, **size, generator=torch.Generator().manual_seed(drawn)), kappa) for of in pair]
        warning = next((why for _, why in left if why is not None), None)
        dimensions.append(paired_dimension(left[0][0], left[1][0], kappa, warning=warning))
        values, first = (each.full for each, _ in left)
        for name in RATIOS:
            ratio = paired_ratio(values[name], first[name]) if name in values and name in first else None
            found[name] += [] if ratio is None else [ratio]
    truths = [of.truths() for of in pair]
    known = {name: truths[0][_told_name(name)] for name in RATIOS}
    resolved = [each for each in dimensions if each is not None]
    at = f"ratio of dimensions at {DAMPINGS[0]:g} λ₁"
    truth = pair[0].dimension(kappa) / pair[1].dimension(kappa)
    cells = [_cell((spectrum, norms, num_sequences, at), truth, resolved)] if resolved else []
    return cells + [
        _cell((spectrum, norms, num_sequences, told), known[name] / truths[1][_told_name(name)], found[name])
        for name, told in RATIOS.items()
        if found[name] and known[name] > 0
    ]


def _told_name(name: str) -> str:
    """As in `Population.truths`."""
    return name.replace("k_d", "k-d").replace("_", " ")


def _left_out(grams: TokenGrams, kappa: float) -> tuple[LeftOut, str | None]:
    """And what warns of the effective dimension at κ."""
    blocks, clusters = gathered(grams, None), clusters_of(grams, None, "a ratio")
    gram = grams.block().double()
    curve, dimension = dimension_of(grams, gram, torch.linalg.eigh(gram), clusters, [kappa], 0.95)
    left = left_out(grams, blocks, clusters, second_moments_of(grams, blocks, clusters), curve)
    return left, dimension.estimates[0].warning


def _cell(which: tuple[str, str, int, str], truth: float, found: list[Estimate]) -> Cell:
    shown = [e for e in found if e.warning is None or which[3] == "effective rank"]
    points = [e.estimate for e in shown if e.estimate is not None]
    mean = sum(points) / len(points) if points else None
    return Cell(
        *which,
        truth=truth,
        printed=len(shown) / len(found),
        held=_share(shown, truth) if shown else None,
        held_all=_share(found, truth),
        bias=None if mean is None else mean / truth - 1 if truth > 0 else mean,
        num_samples=len(found),
    )


def _share(found: Iterable[Estimate], truth: float) -> float:
    held = [e.low - 1e-9 * abs(truth) <= truth <= e.high + 1e-9 * abs(truth) for e in found]
    return sum(held) / len(held)


def pooled(cells: list[Cell]) -> list[Cell]:
    """Those of one estimator and population as one, each by its number of samples."""
    places: dict[tuple[str, str, int, str], list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.spectrum, cell.norms, cell.num_sequences, cell.name), []).append(cell)

    def together(some: list[Cell]) -> Cell:
        count = sum(cell.num_samples for cell in some)
        shown = [(cell.printed * cell.num_samples, cell) for cell in some if cell.held is not None]
        pointed = [(weight, cell.bias) for weight, cell in shown if cell.bias is not None]
        num_shown = sum(weight for weight, _ in shown)
        return replace(
            some[0],
            printed=num_shown / count,
            held=sum(weight * (cell.held or 0.0) for weight, cell in shown) / num_shown if shown else None,
            held_all=sum(cell.num_samples * cell.held_all for cell in some) / count,
            bias=sum(weight * bias for weight, bias in pointed) / sum(weight for weight, _ in pointed)
            if pointed
            else None,
            num_samples=count,
        )

    return [together(some) for some in places.values()]


def markdown(cells: list[Cell]) -> str:
    """A table: rows are estimators and spectra, columns norms, numbers of sequences, and in parentheses of samples."""
    columns = list(dict.fromkeys((cell.norms, cell.num_sequences) for cell in cells))
    samples = {
        column: sorted({c.num_samples for c in cells if (c.norms, c.num_sequences) == column}) for column in columns
    }
    rows = list(dict.fromkeys((cell.name, cell.spectrum) for cell in cells))
    by_place = {(cell.name, cell.spectrum, cell.norms, cell.num_sequences): cell for cell in cells}
    head = (
        "| estimator | spectrum | truth | "
        + " | ".join(f"{norms}, {count} ({' or '.join(map(str, samples[norms, count]))})" for norms, count in columns)
        + " |"
    )
    lines = [head, "| --- | --- | --- |" + " --- |" * len(columns)]
    for name, spectrum in rows:
        found = [by_place.get((name, spectrum, *column)) for column in columns]
        truth = next(cell.truth for cell in found if cell is not None)
        lines.append(f"| {name} | {spectrum} | {truth:.4g} | " + " | ".join(map(_told, found)) + " |")
    return "\n".join(lines)


def tables(cells: list[Cell]) -> dict[int, str]:
    """One a number of sequences, ascending."""
    counts = sorted({cell.num_sequences for cell in cells})
    return {count: markdown([cell for cell in cells if cell.num_sequences == count]) for count in counts}


def _told(cell: Cell | None) -> str:
    """Coverage in per cent, bias of the point in per cent, and what is wrong."""
    if cell is None:
        return ""
    if cell.held is None or not cell.is_printed:
        return f"not printed ({100 * cell.held_all:.0f})"
    text = f"{100 * cell.held:.0f}"
    if cell.bias is not None:
        text += f" ({100 * cell.bias:+.0f} %)"
    if cell.printed < 1:
        text += f", printed {100 * cell.printed:.0f}"
    if cell.is_wide:
        text += ", wide"
    wrong = ["falls short"] * cell.falls_short + ["biased"] * cell.is_biased
    return f"🔴 **{text}** {', '.join(wrong)}" if wrong else text


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description="How often the intervals of ff.population hold the truth."
    )
    found.add_argument("--samples", type=int, default=100, metavar="R", help="of each population; 100")
    found.add_argument("--seed", type=int, default=0, help="of the samples; 0")
    found.add_argument("--sequences", type=int, nargs="+", default=[8, 20, 50], metavar="S", help="8 20 50")
    found.add_argument("--tokens", type=int, default=32, metavar="T", help="of each sequence; 32")
    found.add_argument("--spectra", nargs="+", choices=SPECTRA, default=list(SPECTRA), metavar="NAME")
    found.add_argument("--norms", nargs="+", choices=NORMS, default=list(NORMS), metavar="NAME")
    kind = found.add_mutually_exclusive_group()
    kind.add_argument("--paired", action="store_true", help="ratios of two spectra of the same draws")
    kind.add_argument("--moments", action="store_true", help="second moments and their ratios alone: no eigensolve")
    found.add_argument(
        "--cells", type=Path, metavar="FILE", help="JSON lines: kept, not measured again; seeds are pooled"
    )
    return found


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Command line entry point: 1 where a cell falls short."""
    options = parser().parse_args(arguments)
    cells = read(options.cells)
    of_moments = partial(measure, of_sample=second_moments)
    done = measure_paired if options.paired else of_moments if options.moments else measure
    without = (REFERENCE, "model") if options.paired else ()
    known = {(cell.spectrum, cell.norms, cell.num_sequences, cell.seed) for cell in cells}
    for count in options.sequences:
        for spectrum in (name for name in options.spectra if name not in without):
            for norms in options.norms[:1] if spectrum == "model" else options.norms:
                if (spectrum, population(spectrum, norms).norms, count, options.seed) in known:
                    continue
                new = done(spectrum, norms, count, options.tokens, options.samples, options.seed)
                new = [replace(cell, seed=options.seed) for cell in new]
                cells += new
                if options.cells:
                    with options.cells.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(_plain(cell)) + "\n" for cell in new)
    cells = pooled(cells)
    say("\n\n".join(tables(cells).values()))
    say(f"\n{sum(cell.falls_short or cell.is_biased for cell in cells)} of {len(cells)} cells fall short")
    return int(any(cell.falls_short or cell.is_biased for cell in cells))


def read(path: Path | None) -> list[Cell]:
    """The cells of a file, of each seed; none where there is no file."""
    if path is None or not path.exists():
        return []
    return [Cell(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _plain(cell: Cell) -> dict[str, Any]:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(cell).items()}


if __name__ == "__main__":
    raise SystemExit(main())
