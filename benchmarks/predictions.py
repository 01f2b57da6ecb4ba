"""What `ff.plan` predicts against what a run takes: `python -m benchmarks.predictions`, `--help` for options.

Each workload in a process of its own: a run on a few rows to load what is loaded once, the plan, then the run. Seconds
are those of `ff.fisher_spectrum`, memory is its peak beyond what the process held before, model included. The plan is
held to: seconds within a factor of two, a peak of at most 1.2 times the predicted one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import fisherfunc as ff
from benchmarks.contenders.ours import loss_of
from benchmarks.process import DiedError, in_fresh_process, peak_memory, settled_memory
from benchmarks.tasks import Task, build, on_device
from fisherfunc.runtime.clock import clock

FACTOR = 2.0
MORE_MEMORY = 1.2
LIMIT_S = 1800.0
_MIB = 2**20
_GPT2 = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 5000, "n_positions": 64, "positions": 64}
_TINY = {"n_layer": 2, "n_embd": 128, "n_head": 4, "vocab_size": 1000, "n_positions": 64, "positions": 64}
_MLP = {"samples": 1797, "width": 512}
_LARGE, _LONG = {"sequences": 4, "positions": 64}, {"sequences": 16, "positions": 64}

WORKLOADS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2-tiny": ("gpt2", {**_TINY, "sequences": 4}, {}),
    "gpt2-small": ("gpt2", {**_GPT2, "sequences": 4}, {}),
    "gpt2-small-16": ("gpt2", {**_GPT2, "sequences": 16}, {}),
    "gpt2-small-limited": ("gpt2", {**_GPT2, "sequences": 4}, {"memory_limit": 150_000_000}),
    "gpt2-small-sequences": ("gpt2", {**_GPT2, "sequences": 16}, {"unit": "sequence"}),
    "gpt2-tiny-dense": ("gpt2", {**_TINY, "sequences": 2}, {"route": "dense"}),
    "mlp": ("mlp", _MLP, {}),
    "mlp-classes": ("mlp", {**_MLP, "samples": 512, "classes": True}, {}),
    "cnn": ("cnn", {"samples": 1797, "channels": (32, 64)}, {}),
    "embedded": ("embedded", {"tokens": 512}, {}),
    "gpt2-124m": ("gpt2", _LARGE, {}),
    "gpt2-124m-bfloat16": ("gpt2", _LARGE, {"dtype": torch.bfloat16}),
    "gpt2-124m-4gb": ("gpt2", _LONG, {"memory_limit": 4 * 10**9}),
    "gpt2-124m-1gb": ("gpt2", _LONG, {"memory_limit": 10**9}),
}
QUICK = ("gpt2-tiny", "gpt2-tiny-dense", "mlp")


def embedded(*, tokens: int) -> Task:
    """The embedded model on its sample text."""
    from fisherfunc import assets
    from fisherfunc.models.huggingface import load, text_batches

    loaded = load(assets.checkpoint())
    text = assets.sample_text().read_text(encoding="utf-8")
    ids = torch.cat(
        [b["input_ids"] for b in text_batches(loaded.tokenizer, text, task=loaded.task, context=64, num_tokens=tokens)]
    )
    return Task(kind="causal_lm", model=loaded.model, inputs=ids, targets=ids[:, 1:])


def compare(task: str, sizes: dict[str, Any], options: dict[str, Any], device: str) -> dict[str, Any]:
    """Plan and run a workload in this process."""
    built = on_device(embedded(**sizes) if task == "embedded" else build(task, sizes), device)
    options = {**options, "loss": loss_of(built)}
    ff.fisher_spectrum(built.model, built.small().batch, **options)
    begin = clock(built.device)
    plan = ff.plan(built.model, built.batch, **options)
    planned = clock(built.device) - begin
    base = settled_memory(built.device)
    begin = clock(built.device)
    result = ff.fisher_spectrum(built.model, built.batch, **options)
    seconds = clock(built.device) - begin
    found = result.metadata["plan"]
    return {
        "units": plan.num_units,
        "passes": [plan.num_passes, found["num_passes"]],
        "plan_seconds": planned,
        "seconds": [plan.seconds["total"], seconds],
        "parts": dict(plan.seconds),
        "bytes": [plan.peak_bytes, peak_memory(built.device) - base],
        "outcome": result.metadata["outcome"],
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: predicted, measured and their ratio."""
    lines = [
        "| workload | rows | passes | s predicted | measured | ratio | MiB predicted | measured | ratio | holds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, one in found.items():
        if "reason" in one:
            lines.append(f"| {name} | {one['reason']} |" + " |" * 8)
            continue
        (time, took), (memory, peak) = one["seconds"], one["bytes"]
        holds = 1 / FACTOR <= took / time <= FACTOR and peak <= MORE_MEMORY * memory
        figures = f"{time:.2f} | {took:.2f} | {took / time:.2f} | {memory / _MIB:,.0f} | {peak / _MIB:,.0f}"
        ratio = f"{peak / memory:.2f} | {'yes' if holds else 'no'}"
        lines.append(f"| {name} | {one['units']:,} | {one['passes'][1]} | {figures} | {ratio} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description="Plans against runs.")
    parser.add_argument("--quick", action="store_true", help="three small workloads: some ten seconds")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--device", default="cpu", help="where models and data lie: cpu, cuda, cuda:1 …")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    for name in options.only or (QUICK if options.quick else WORKLOADS):
        try:
            found[name] = in_fresh_process(compare, *WORKLOADS[name], options.device, limit_s=LIMIT_S)
        except DiedError as error:
            found[name] = {"reason": str(error)}
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
