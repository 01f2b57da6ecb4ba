"""`python -m benchmarks.zoo [--kind KIND...] [--only NAME...] [--shard I/N]` and more (`--help`).

The public models against the float64 loop, and whether there is a row that is wrong.

Every model runs in a process of its own. Rows go to a file of JSON lines as they come; a model that has one is not run
again. The exit code is 1 where a row is wrong or failed.
"""

import argparse
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

from benchmarks.process import DiedError, in_fresh_process
from benchmarks.zoo.judge import KINDS, Row, judge, names
from benchmarks.zoo.table import markdown, summary

_WAIT = 20  # times the limit: a process that takes no processor time waits for something that never comes


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="Public models against a loop.")
    found.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="what is run; everything")
    found.add_argument("--only", nargs="+", metavar="NAME", help="these models; see --list")
    found.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="every Nth model, from the Ith on")
    found.add_argument("--limit", type=int, default=60, metavar="SECONDS", help="of processor time for one model; 60")
    found.add_argument("--rows", type=Path, default=Path("zoo.jsonl"), help="finished rows, kept and read; zoo.jsonl")
    found.add_argument("--table", type=Path, metavar="FILE", help="write the table as Markdown")
    found.add_argument("--list", action="store_true", help="show the models, and run nothing")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line entry point."""
    options = parser().parse_args(arguments)
    cases = list(_cases(options.kind, options.only))
    unknown = sorted({*(options.only or [])} - {name for _, name in cases})
    if unknown:
        raise SystemExit(f"no model is called {', '.join(unknown)} among {', '.join(options.kind)}; see --list")
    first, step = options.shard
    cases = cases[first - 1 :: step]
    if options.list:
        print("\n".join(f"{kind} {name}" for kind, name in cases))
        return 0
    _preload()
    done = {(row.kind, row.name): row for row in _read(options.rows)}
    for number, (kind, name) in enumerate(cases, start=1):
        if (kind, name) not in done:
            row = done[kind, name] = _judged(kind, name, options.limit)
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(f"[{number}/{len(cases)}] {_told(row)}", file=sys.stderr, flush=True)
    rows = [done[case] for case in cases]
    print(summary(rows))
    if options.table:
        options.table.write_text(markdown(rows), encoding="utf-8")
    return int(any(row.verdict in ("wrong", "failed") for row in rows))


def _preload() -> None:
    """Start the server that `in_fresh_process` forks from with what this sweep needs; it then takes the running one."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.zoo.preload"])
        forkserver.ensure_running()


def _cases(kinds: Iterable[str], only: list[str] | None) -> Iterable[tuple[str, str]]:
    for kind in kinds:
        found = names(kind)
        if not found:
            print(f"{kind}: {'peft' if kind == 'adapters' else 'timm'} is not installed", file=sys.stderr)
        yield from ((kind, name) for name in found if only is None or name in only)


def _judged(kind: str, name: str, limit_s: int) -> Row:
    try:
        return in_fresh_process(judge, kind, name, limit_s, limit_s=_WAIT * limit_s)
    except DiedError as error:
        return dead(kind, name, limit_s, error)


def dead(kind: str, name: str, limit_s: int, error: DiedError) -> Row:
    """The row of a model whose process came to no result."""
    row = partial(Row, kind=kind, name=name)
    if f"code {-signal.SIGXCPU}" in str(error):
        return row(verdict="over time", reason=f"more than {limit_s} s of processor time", seconds=limit_s)
    return row(verdict="failed", reason=str(error))


def _told(row: Row) -> str:
    reason = "" if row.verdict == "right" else f": {row.reason}"
    return f"{row.kind} {row.name}: {row.verdict} ({row.seconds:.0f} s){reason}"


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]


def shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; expected I/N with 1 <= I <= N, such as 2/8")
    return int(number), int(count)


if __name__ == "__main__":
    sys.exit(main())
