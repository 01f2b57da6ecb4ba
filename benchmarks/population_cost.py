"""`python -m benchmarks.population_cost [--tokens N...] [--sequences S] [--main-job]`: what estimates cost.

Of the population, beside the eigensolve with vectors of the same Gram, in seconds of the processor, so that other work
on the machine does not count; and memory beyond the Gram and its eigenvectors, at its peak, in matrices of N × N
numbers. Rows are Gaussian, of sequences that share a part; a table in Markdown. SciPy is imported before, by estimates
of a few tokens: half a second of each process. With `--main-job` also their share of the main job, with that import; of
the job the model is loaded, passed over and solved, no more.
"""

import argparse
from collections.abc import Callable
from time import process_time

import torch

from benchmarks.coverage import population, sample
from benchmarks.pool import pool
from benchmarks.process import peak_memory, settled_memory
from fisherfunc import spectrum_of_grams
from fisherfunc.linalg.grams.token_grams import TokenGrams
from fisherfunc.population.clusters import clusters_of
from fisherfunc.population.summary import summary_of

MAIN_JOB = 512
"""Tokens that it asks for."""


def cost(grams: TokenGrams) -> tuple[float, float, float]:
    """Seconds of the eigensolve with vectors, of all estimates where its result is at hand, and their matrices."""
    found = clusters_of(grams, None, "the cost")
    gram = grams.block().double()
    begin = process_time()
    eigenpairs = torch.linalg.eigh(gram)
    solve = process_time() - begin
    before = settled_memory(gram.device)
    begin = process_time()
    summary_of(grams, found, eigenpairs=eigenpairs)
    rest = process_time() - begin
    return solve, rest, (peak_memory(gram.device) - before) / gram.nbytes


def table(sizes: list[int], num_sequences: int, num_params: int) -> str:
    """A row a number of tokens."""
    lines = [
        f"| tokens of {num_sequences} sequences | eigensolve with vectors, s | estimates besides, s | ratio | N × N |",
        "| --- | --- | --- | --- | --- |",
    ]
    of = population("1/k", "gaussian", num_params)
    cost(sample(of, num_sequences=8, num_tokens=2, generator=torch.Generator().manual_seed(0)))
    for size in sizes:
        tokens = {"num_sequences": num_sequences, "num_tokens": size // num_sequences}
        solve, rest, held = cost(sample(of, **tokens, generator=torch.Generator().manual_seed(0)))
        count = size // num_sequences * num_sequences
        lines.append(f"| {count:,} | {solve:.1f} | {rest:.1f} | {rest / solve:.2f} | {held:.1f} |")
    return "\n".join(lines)


def of_main_job() -> str:
    """A line: seconds of the processor, of all and of the estimates."""
    begin = process_time()
    grams = pool(MAIN_JOB)
    passed = process_time() - begin
    estimates = cost(grams)[1]
    begin = process_time()
    spectrum_of_grams(grams, population=False)
    whole = passed + estimates + process_time() - begin
    return f"Main job, {grams.num_rows} tokens: {whole:.1f} s, estimates {estimates:.2f} s, {estimates / whole:.1%}\n"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.population_cost", description="What estimates of the population cost."
    )
    found.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], metavar="N", help="1024 2048")
    found.add_argument("--sequences", type=int, default=64, metavar="S", help="64")
    found.add_argument("--params", type=int, default=4096, metavar="P", help="parameters of the population; 4096")
    found.add_argument("--main-job", action="store_true", help="first, their share of the main job")
    return found


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Command line entry point."""
    options = parser().parse_args(arguments)
    if min(options.tokens) < options.sequences or options.sequences < 5:
        raise SystemExit("--sequences expected five or more, and --tokens no fewer than that")
    if options.main_job:
        say(of_main_job())
    say(table(options.tokens, options.sequences, options.params))


if __name__ == "__main__":
    main()
