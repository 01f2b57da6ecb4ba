"""`python -m benchmarks.population_cost [--tokens N...] [--sequences S]`: what estimates of the population cost.

Beside the eigensolve with vectors of the same Gram, in seconds of the processor, so that other work on the machine does
not count: no more than that. Rows are Gaussian, of sequences that share a part; a table in Markdown. SciPy is imported
before, by estimates of a few tokens: a second or two of each process.
"""

import argparse
from collections.abc import Callable
from time import process_time

import torch

from benchmarks.coverage import population, sample
from fisherfunc.linalg.token_grams import TokenGrams
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.summary import summary_of


def seconds(grams: TokenGrams) -> tuple[float, float]:
    """Of the eigensolve with vectors, and of all estimates where its result is at hand."""
    found = clusters_of(grams, None, "the cost")
    gram = grams.block().double()
    begin = process_time()
    eigenpairs = torch.linalg.eigh(gram)
    solved = process_time()
    summary_of(grams, found, eigenpairs=eigenpairs)
    return solved - begin, process_time() - solved


def table(sizes: list[int], num_sequences: int, num_params: int) -> str:
    """A row a number of tokens."""
    lines = [
        f"| tokens of {num_sequences} sequences | eigensolve with vectors, s | estimates besides, s | ratio |",
        "| --- | --- | --- | --- |",
    ]
    of = population("1/k", "gaussian", num_params)
    seconds(sample(of, num_sequences=8, num_tokens=2, generator=torch.Generator().manual_seed(0)))
    for size in sizes:
        tokens = {"num_sequences": num_sequences, "num_tokens": size // num_sequences}
        solve, rest = seconds(sample(of, **tokens, generator=torch.Generator().manual_seed(0)))
        lines.append(f"| {size // num_sequences * num_sequences:,} | {solve:.1f} | {rest:.1f} | {rest / solve:.2f} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.population_cost", description="What estimates of the population cost."
    )
    found.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], metavar="N", help="1024 2048")
    found.add_argument("--sequences", type=int, default=64, metavar="S", help="64")
    found.add_argument("--params", type=int, default=4096, metavar="P", help="parameters of the population; 4096")
    return found


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Command line entry point."""
    options = parser().parse_args(arguments)
    if min(options.tokens) < options.sequences or options.sequences < 5:
        raise SystemExit("--sequences expected five or more, and --tokens no fewer than that")
    say(table(options.tokens, options.sequences, options.params))


if __name__ == "__main__":
    main()
