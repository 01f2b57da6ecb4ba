"""`python -m benchmarks.pool [--tokens N] [--windows W...] [--grams FILE]`: is the population one number?

The first 64 windows of the embedded text are passed over once. Disjoint subsets of 8, 16 and 32, dealt in turn so that
each is spread over them, are each asked for the population: what the sample gives falls or rises with the number of
tokens, what `ff.population` gives should not. Each subset's interval is held against the point of other windows, up to
32, whose own error is not in it. Prints two tables in Markdown.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from fisherfunc import functionalize, token_grams
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.models.huggingface import text_windows
from fisherfunc.partitioning import by_layer
from fisherfunc.population import Estimate, PopulationSummary, summary
from fisherfunc.statistics import block_coupling
from fisherfunc.surface.jobs.job import EMBEDDED_CONTEXT, Job, loaded_model, pass_options
from fisherfunc.surface.jobs.texts import read_documents

KAPPA = 10.0
LEAST = 5
"""Windows that four moments and their errors need."""
MOST_OTHERS = 32
FIRST, SECOND = "layer.0", "layer.1"
COMPARED = ("participation ratio", "block-diagonal error", "alignment", "effective dimension")


def pool(num_tokens: int) -> TokenGrams:
    """The Grams of that many tokens of the embedded model, from the beginning of its text."""
    job = Job(num_tokens=num_tokens)
    loaded, *_ = loaded_model(job)
    options = {"task": loaded.task, "context": EMBEDDED_CONTEXT, "num_tokens": num_tokens}
    batches = text_windows(loaded.tokenizer, read_documents(None), spread=False, **options).batches
    fn, options = functionalize(loaded.model), pass_options(job, loaded)
    return token_grams(fn, fn.params, batches, options["loss"], num_tokens=num_tokens, blocks=by_layer)


def subsets(grams: TokenGrams, num_windows: int) -> list[torch.Tensor]:
    """Masks of the rows of disjoint subsets of that many windows."""
    sequence = grams.tokens.sequence
    windows = sequence.unique()
    count = len(windows) // num_windows
    return [torch.isin(sequence, windows[start::count][:num_windows]) for start in range(count)]


def other_windows(grams: TokenGrams, mask: torch.Tensor) -> TokenGrams:
    """Windows that are not in a subset, spread over the text."""
    rest = grams.select(~mask)
    windows = rest.tokens.sequence.unique()
    count = min(MOST_OTHERS, len(windows))
    return rest.select(torch.isin(rest.tokens.sequence, windows[torch.arange(count) * len(windows) // count]))


def of_sample(grams: TokenGrams) -> dict[str, float]:
    """What is printed of these tokens."""
    gram, count = grams.block().double(), grams.num_units
    values = torch.linalg.eigvalsh(gram).clamp(min=0) / count
    coupling = block_coupling(grams)
    first, second = coupling.labels.index(FIRST), coupling.labels.index(SECOND)
    return {
        "λ_max": float(values[-1]),
        "largest ‖g‖²/N": float(gram.diagonal().max()) / count,
        "participation ratio": float(values.sum() ** 2 / values.square().sum()),
        "block-diagonal error": coupling.block_diagonal_error,
        "alignment": coupling.alignment[first][second],
        "effective dimension": float((values / (values + KAPPA)).sum()),
    }


def of_population(found: PopulationSummary) -> dict[str, Estimate]:
    """What is said of the population, by the same names."""
    first, second = found.coupling.labels.index(FIRST), found.coupling.labels.index(SECOND)
    return {
        "participation ratio": found.participation_ratio.full,
        "block-diagonal error": found.block_diagonal_error,
        "alignment": found.coupling.alignment[first][second],
        "effective dimension": found.effective_dimension.estimates[0],
    }


def ends_of_moments(found: PopulationSummary) -> tuple[float, float]:
    """The ends of λ₁, max(p₃/p₂, p₄/p₃) and p₄^¼, before they are widened."""
    second, third, fourth = (entry.estimate or math.nan for entry in found.moments[1:4])
    return max(third / second, fourth / third), fourth**0.25


def tables(grams: TokenGrams, sizes: list[int]) -> str:
    """Means over subsets, and how often a subset's interval holds the point of the others."""
    everything = len(grams.tokens.sequence.unique())
    columns = [size for size in sizes if 2 * size <= everything] + [everything]
    sample: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {name: [] for name in COMPARED}
    for size in columns:
        masks = subsets(grams, size)
        found = [summary(grams.select(mask), blocks=None, kappas=[KAPPA]) for mask in masks]
        plain = [of_sample(grams.select(mask)) for mask in masks]
        means = {name: _mean([entry[name] for entry in plain]) for name in plain[0]}
        ends = [_mean(end) for end in zip(*map(ends_of_moments, found), strict=True)]
        points = {name: _mean([of_population(each)[name].estimate for each in found]) for name in COMPARED}
        for name in ("λ_max", "largest ‖g‖²/N"):
            sample.setdefault(name, []).append(f"{means[name]:.1f}")
        sample.setdefault("λ₁, ends from moments", []).append(f"{ends[0]:.1f} … {ends[1]:.1f}")
        widened = [_mean([each.leading_eigenvalue.low for each in found])]
        widened += [_mean([each.leading_eigenvalue.high for each in found])]
        sample.setdefault("λ₁, ends widened by their errors", []).append(f"{widened[0]:.1f} … {widened[1]:.1f}")
        for name in COMPARED:
            sample.setdefault(f"{name}, sample → population", []).append(f"{means[name]:.4g} → {points[name]:.4g}")
        if size == everything:
            continue
        others = [of_population(summary(other_windows(grams, mask), blocks=None, kappas=[KAPPA])) for mask in masks]
        for name in COMPARED:
            pairs = [(of_population(each)[name], other[name]) for each, other in zip(found, others, strict=True)]
            count = sum(e.low <= (o.estimate or math.nan) <= e.high for e, o in pairs)
            spread = "; ".join(f"{e.low:.3g} … {e.high:.3g}" for e, _ in pairs[:2])
            held[name].append(f"{count} of {len(pairs)}: {spread}")
    tokens = [grams.num_rows * size // everything for size in columns]
    head = "| embedded model | " + " | ".join(f"{count:,} tokens" for count in tokens) + " |"
    lines = [head, "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in sample.items()]
    lines += ["", "Intervals of a subset that hold the point of other windows, and the first two of them:", ""]
    lines += [head.rsplit("|", 2)[0] + "|", "| --- |" + " --- |" * (len(columns) - 1)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in held.items()]
    return "\n".join(lines)


def _mean(values: list[float | None] | tuple[float, ...]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.pool", description="Is the population one number?")
    found.add_argument("--tokens", type=int, default=4032, metavar="N", help="of the pool: 64 windows of 63; 4032")
    found.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32], metavar="W", help="of a subset; 8 16 32")
    found.add_argument("--grams", type=Path, metavar="FILE", help="the Grams of the pool: read, or written where none")
    return found


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Command line entry point."""
    options = parser().parse_args(arguments)
    if min(options.windows) < LEAST:
        raise SystemExit(f"--windows {min(options.windows)}: four moments and their errors need {LEAST} or more")
    if options.grams is not None and options.grams.exists():
        grams = TokenGrams.load(options.grams)
    else:
        grams = pool(options.tokens)
        if options.grams is not None:
            grams.save(options.grams)
    say(tables(grams, options.windows))


if __name__ == "__main__":
    main()
