"""What it costs that every call starts from the module as it was given: `python -m benchmarks.isolation`, `--help`.

Each workload runs with the calls that `ff.functionalize` makes, and with calls that have none of its care: one copy of
the module for all of them, weights swapped in by torch, no look at what is written to, no random state put back. Runs
of the two alternate; the least processor time of each counts. Another run counts copies, of the structure and weights,
and one more has the processor time of making them, which does not hang on what else the machine does.
"""

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherfunc as ff
from benchmarks.contenders.ours import loss_of
from benchmarks.process import DiedError, in_fresh_process
from benchmarks.run import LIMIT_S
from benchmarks.sections import Section, timed_by
from benchmarks.stopwatch import Stopwatch
from benchmarks.table import grid
from benchmarks.tasks import Described, Task, build
from benchmarks.workloads import WORKLOADS
from fisherfunc.gradients.autodiff.model_function import Calls, ModelFunction
from fisherfunc.gradients.autodiff.module_calls import watch_parts
from fisherfunc.models import functionalize as models
from fisherfunc.models.calls.isolation import Blueprint

MEMORY_LIMIT = 4 * 10**9
"""Of every run: what is free would make the numbers those of a machine."""
SMALL = ("gpt2-small", "mlp", "mlp-classes", "cnn")
"""What runs where nothing is asked for."""
COPYING = "copying"
MADE_BY = ("evaluation_copy", "Blueprint", "fresh_copy", "isolated")
"""What `ff.functionalize` looks up to copy modules and batches."""
COPIES, CHECKS, WATCHED, WEIGHTS = "copies", "copies for the check", "calls watched", "weights copied"


def without_care(fn: ModelFunction, task: Task) -> ModelFunction:
    """The function of a model, by calls that are not isolated; right for a model that keeps and writes nothing.

    Args:
        fn: What `ff.functionalize` made.
        task: Whose model it is.
    """
    module = copy.deepcopy(task.model)
    watch_parts(module)  # as segments need it

    def passes(tensors: dict[str, Tensor], batch: Any) -> Any:
        positional = batch[:-1] if isinstance(batch, tuple) else ()
        keywords = {"use_cache": False, **batch} if isinstance(batch, Mapping) else {}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(module, tensors, positional, keywords)

    def ordinary(tensors: dict[str, Tensor], wanted: Collection[str]) -> tuple[dict[str, Tensor], Callable[..., Any]]:
        leaves = {name: tensors[name].detach().requires_grad_() for name in wanted}
        return leaves, lambda batch: passes({**tensors, **leaves}, batch)

    return replace(fn, call=Calls(passes, ordinary), given_targets=None)


def run(task: Task, *, isolated: bool) -> dict[str, Tensor]:
    """Grams by layer of a task.

    Args:
        task: What is run.
        isolated: Whether by the package's own calls.
    """
    fn = ff.functionalize(task.model)
    fn = fn if isolated else without_care(fn, task)
    return ff.token_grams(fn, fn.params, task.batch, loss_of(task), blocks=ff.by_layer, memory_limit=MEMORY_LIMIT).grams


@contextmanager
def counting(counts: Counter[str]) -> Iterator[None]:
    """Count, inside, the copies that are made of a module, the calls that are watched, and copied bytes of weights."""
    build_one, copy_one, watch_one = Blueprint.build, models.fresh_copy, models.Guard.watched

    def built(self: Blueprint, tensors: Mapping[str, Tensor]) -> torch.nn.Module:
        made = build_one(self, tensors)
        counts[COPIES] += 1
        given = {tensor.data_ptr() for tensor in tensors.values()}
        counts[WEIGHTS] += sum(p.nbytes for p in made.parameters() if p.data_ptr() not in given)
        return made

    def copied(module: torch.nn.Module, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Any:
        counts[CHECKS] += 1
        counts[WEIGHTS] += sum(
            parameter.nbytes
            for name, parameter in parameters.items()
            if parameter.data_ptr() != tensors[name].data_ptr()
        )
        return copy_one(module, parameters, tensors)

    def watched(self: Any, *args: Any) -> Any:
        counts[WATCHED] += 1
        return watch_one(self, *args)

    with (
        patch.object(Blueprint, "build", built),
        patch.object(models, "fresh_copy", copied),
        patch.object(models.Guard, "watched", watched),
    ):
        yield


def measured(task: Described, repeats: int) -> dict[str, Any]:
    """Counts, the share of copying, processor seconds with and without, and how far the Grams of these are apart.

    Args:
        task: As a fresh process is told of it.
        repeats: How many runs of each.
    """
    torch.set_num_threads(1)
    built, counts = build(*task), Counter[str]()
    with counting(counts):
        ours = run(built, isolated=True)
    watch, sections = Stopwatch(process_time), [Section(owner=models, name=name, title=COPYING) for name in MADE_BY]
    begin = process_time()
    with timed_by(watch, [*sections, Section(owner=Blueprint, name="build", title=COPYING)]):
        run(built, isolated=True)
    share = watch.seconds[COPYING] / (process_time() - begin)
    theirs = run(built, isolated=False)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * repeats):
        isolated = number % 2 == 0
        begin = process_time()
        run(built, isolated=isolated)
        seconds[isolated].append(process_time() - begin)
    off = max(float((ours[n] - theirs[n]).abs().max() / ours[n].abs().max()) for n in ours)
    return {"counts": dict(counts), "with": seconds[True], "without": seconds[False], "share": share, "off": off}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row a workload.

    Args:
        found: {workload: what `measured` returned, or why there is nothing}.
    """
    head = ["workload", COPIES, CHECKS, WATCHED, WEIGHTS, "copying takes", "processor time", "without", "ratio"]
    rows = []
    for name, one in found.items():
        if "reason" in one:
            rows.append([name, str(one["reason"]), *[""] * (len(head) - 2)])
            continue
        with_care, without = min(one["with"]), min(one["without"])
        counts = [f"{one['counts'].get(what, 0):,}" for what in (COPIES, CHECKS, WATCHED)]
        weights = f"{one['counts'].get(WEIGHTS, 0):,} bytes"
        share = f"{one['share']:.1%}"
        rows.append(
            [name, *counts, weights, share, f"{with_care:.2f} s", f"{without:.2f} s", f"{with_care / without:.3f}"]
        )
    return grid(head, rows, "---:")


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.isolation", description="What isolation costs.")
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each kind; 5")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args(arguments)
    size = "quick" if options.quick else "full"
    found: dict[str, dict[str, Any]] = {}
    for workload in WORKLOADS:
        if workload.name in (options.only or SMALL):
            task = (workload.task, workload.sizes[size], "cpu")
            try:
                found[workload.name] = in_fresh_process(measured, task, options.repeats, limit_s=LIMIT_S[size])
            except DiedError as error:
                found[workload.name] = {"reason": str(error)}
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
