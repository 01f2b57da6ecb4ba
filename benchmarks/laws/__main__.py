"""`python -m benchmarks.laws --cases 100000 [--first SEED] [--shard I/N] [--rows FILE]` and `--case SEED`.

Generated cases against the loop, one a seed. Rows go to a file of JSON lines as they come; a seed that has one is not
run again. The exit code is 1 where a case is wrong, changed or failed. `--case` runs one and says what it is, and which
of its parts are enough for the same verdict.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.laws.judge import BAD, VERDICTS, Row, judged
from benchmarks.laws.recipe import Recipe, drawn
from benchmarks.zoo.__main__ import shard

_HEAD = 60  # letters of a refusal's message, by which refusals are counted


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.laws", description="Generated cases against a loop.")
    found.add_argument("--cases", type=int, default=1000, metavar="N", help="how many; 1000")
    found.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed; 0")
    found.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="every Nth seed, from the Ith on")
    found.add_argument("--rows", type=Path, metavar="FILE", help="finished rows, kept and read")
    found.add_argument("--case", type=int, metavar="SEED", help="run this one, and explain it")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line entry point."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.case is not None:
        row = judged(drawn(options.case))
        print(explained(drawn(options.case), row))
        return int(row.verdict in BAD)
    first, step = options.shard
    seeds = range(options.first + first - 1, options.first + options.cases, step)
    done = _read(options.rows)
    for number, seed in enumerate(seeds, start=1):
        if seed not in done:
            row = done[seed] = judged(drawn(seed))
            if options.rows:
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            if row.verdict in BAD:
                print(f"seed {seed}: {row.verdict}: {row.reason[:300]}", file=sys.stderr, flush=True)
        if number % 100 == 0:
            print(f"[{number}/{len(seeds)}]", file=sys.stderr, flush=True)
    rows = [done[seed] for seed in seeds]
    print(summary(rows))
    return int(any(row.verdict in BAD for row in rows))


def explained(recipe: Recipe, row: Row) -> str:
    """What a case is, its verdict, and the fewest of its parts that have it."""
    lines = [f"{name}: {value}" for name, value in asdict(recipe).items()]
    few = recipe
    for name in recipe.parts:
        fewer = tuple(part for part in few.parts if part != name)
        if row.verdict != "right" and judged(replace(few, parts=fewer)).verdict == row.verdict:
            few = replace(few, parts=fewer)
    enough = [] if row.verdict == "right" else [f"enough: {few.parts}"]
    return "\n".join([*lines, f"samples meet: {row.meets}", *enough, f"{row.verdict} {row.reason}".rstrip()])


def summary(rows: Iterable[Row]) -> str:
    """How many cases have which verdict, and what was refused."""
    rows = list(rows)
    counts = Counter(row.verdict for row in rows)
    apart = [row for row in rows if row.meets is False]
    heads = Counter(_head(row.reason) for row in rows if row.verdict == "refused")
    return "\n".join(
        [
            f"{len(rows)} cases: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS),
            f"of {len(apart)} whose samples do not meet {sum(row.verdict == 'right' for row in apart)} are right; "
            f"of {sum(row.meets is True for row in rows)} whose samples meet "
            f"{sum(row.meets is True and row.verdict == 'refused' for row in rows)} are refused",
            *(f"{count:6} {head}" for head, count in heads.most_common()),
        ]
    )


def _head(reason: str) -> str:
    return re.sub(r"\d[\d.,e+-]*", "#", re.sub(r"'[^']*'", "'…'", reason))[:_HEAD]


def _read(path: Path | None) -> dict[int, Row]:
    if path is None or not path.exists():
        return {}
    found = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {row.seed: row for row in found}


if __name__ == "__main__":
    sys.exit(main())
