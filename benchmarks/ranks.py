"""Two ranks of one thread against one process of one thread: `python -m benchmarks.ranks`, `--help` for options.

A GPT-2 of random weights and ids, from the call of `fisher_spectrum` to its result, once a tiny one has run: torch
imports much of itself at first use. Efficiency of wall time is
T₁/(R T_R), and means something on idle cores alone; that of processor time is C₁/Σ C_r over ranks. What ranks do not
divide counts against both. `--predict` prints the documentation's table for machines that are not here instead: no
number in it is measured.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import fisherfunc as ff
from benchmarks.table import grid
from fisherfunc.gradients.factored.estimate import Cost
from fisherfunc.gradients.planning.over_ranks import over_ranks
from fisherfunc.gradients.planning.run_plan import RunPlan, with_eigensolve

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 500, "n_positions": 64},
    "small": {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 5000, "n_positions": 64},
    "124m": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 64},
}
LLAMA_1B = {"layers": 16, "width": 2048, "inner": 8192, "vocabulary": 128_256, "kv": 512}
GPU = {"passes": 3e14 * 0.4, "contraction": 3e14 * 0.3, "eigensolve": 5e11, "bytes": 5e10}
"""Assumed of one GPU: 40 and 30 % of 300 TFLOP/s in bfloat16, 0.5 TFLOP/s of a float64 eigensolver, 50 GB/s."""


def main() -> None:
    """Measure, or predict, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--tokens", type=int, default=504)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file of the numbers")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _one(options.model, options.tokens, Path(options.one))
    elif options.predict:
        print(predicted())
    else:
        found = {size: _measured(options.model, options.tokens, size) for size in (1, options.ranks)}
        print(_table(found))
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n")


def _one(name: str, num_tokens: int, out: Path) -> None:
    """What one rank does: a spectrum, and its seconds, of the wall and of the processor."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warm, ids = GPT2LMHeadModel(GPT2Config(**MODELS["tiny"])).eval(), torch.randint(500, (2, 16))
    ff.fisher_spectrum(warm, {"input_ids": ids, "labels": ids}, loss=ff.losses.causal_lm())
    sizes = MODELS[name]
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    count = -(-num_tokens // (sizes["n_positions"] - 1))
    ids = torch.randint(sizes["vocab_size"], (count, sizes["n_positions"]))
    batch = {"input_ids": ids, "labels": ids}
    ranks = ff.distributed.ranks()
    begin, used = perf_counter(), _processor()
    result = ff.fisher_spectrum(
        model,
        batch,
        loss=ff.losses.causal_lm(),
        num_tokens=num_tokens,
        ranks=ranks if ranks.size > 1 else None,
        population=False,
    )
    found = {"wall": perf_counter() - begin, "processor": _processor() - used}
    found |= {"largest": float(result.full.eigenvalues[0]), "ranks": result.metadata.get("ranks")}
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measured(model: str, num_tokens: int, size: int) -> list[dict[str, Any]]:
    """The same of each of so many ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.ranks",
            "--one",
            folder,
            "--model",
            model,
            "--tokens",
            str(num_tokens),
        ]
        started = [subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank)}) for rank in range(size)]
        statuses = [process.wait() for process in started]
        if any(statuses):
            raise RuntimeError(f"a rank of {size} failed")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def _table(found: dict[int, list[dict[str, Any]]]) -> str:
    alone = found[1][0]
    rows = []
    for size, each in found.items():
        wall, processor = max(one["wall"] for one in each), sum(one["processor"] for one in each)
        efficiency = [alone["wall"] / size / wall, alone["processor"] / processor]
        sent = max(one["bytes_sent"] for one in each[0]["ranks"]) if each[0]["ranks"] else 0
        row = [str(size), f"{wall:.1f}", f"{processor:.1f}", *(f"{value:.2f}" for value in efficiency)]
        rows.append([*row, f"{sent / 1e6:.1f}", f"{each[0]['largest']:.6g}"])
    head = ["ranks", "seconds", "of processors", "efficiency", "of processors", "MB sent by a rank", "λ_max"]
    return grid(head, rows, "---:")


def predicted() -> str:
    """The documentation's table of a model of a billion parameters, on GPUs that are assumed."""
    rows = []
    for num_tokens in (4096, 32768):
        for size in (1, 8, 64):
            found = over_ranks(_llama(num_tokens), size, share=1 / size, num_grams=18, rates=GPU)
            seconds, memory = found.seconds, found.peak_bytes
            parts = [f"{seconds[name]:,.0f}" for name in ("passes", "contraction", "exchange", "eigensolve", "total")]
            rows.append(
                [f"{num_tokens:,}", str(size), *parts, f"{memory / 1e9:,.0f}", f"{found.bytes_sent / 1e9:,.0f}"]
            )
    head = ["tokens", "GPUs", "passes, s", "contraction", "exchange", "eigensolves", "total", "GB a GPU", "GB sent"]
    return grid(head, rows, "---:")


def _llama(num_tokens: int, context: int = 512) -> RunPlan:
    """The plan of a Llama of a billion parameters in bfloat16, in windows: operations and bytes by hand."""
    shape = LLAMA_1B
    width, inner = shape["width"], shape["inner"]
    maps = [(width, width), (width, shape["kv"]), (width, shape["kv"]), (width, width), *[(width, inner)] * 2]
    maps.append((inner, width))
    costs = {}
    windows = num_tokens / context
    for layer in range(shape["layers"]):
        for number, (d_in, d_out) in enumerate(maps):
            once = 2.0 * d_in * d_out * context
            costs[f"{layer}.{number}"] = Cost(
                route="pairwise",
                why="by hand",
                num_params=d_in * d_out,
                held_bytes=num_tokens * context * d_out,  # half of the places, of two bytes
                forward=once * 3 * windows,
                backward=once * num_tokens / 2,
                contraction=float(num_tokens) ** 2 * context * d_out * 0.75,
            )
    size = shape["vocabulary"] * width
    costs["head"] = Cost(
        route="output layer",
        why="by hand",
        num_params=size,
        held_bytes=2 * num_tokens * shape["vocabulary"],
        forward=2.0 * size * num_tokens,
        backward=2.0 * size * num_tokens,
        contraction=float(num_tokens) ** 2 * (shape["vocabulary"] + width),
    )
    sums = {key: sum(getattr(cost, key) for cost in costs.values()) for key in ("forward", "backward", "contraction")}
    layer_bytes = sum(cost.held_bytes for name, cost in costs.items() if name.startswith("0."))
    empty = RunPlan(
        route="factored",
        reason=None,
        num_units=num_tokens,
        num_sequences=int(windows),
        num_params=sum(cost.num_params for cost in costs.values()),
        groups=tuple(tuple(name for name in costs if name.split(".")[0] == part) for part in _parts(costs)),
        chunk_size=32,
        stack_width=1,
        parameters=costs,
        operations=sums,
        memory_limit=0,
        peak_bytes=19 * num_tokens**2 * 8 + layer_bytes,
    )
    return replace(with_eigensolve(empty, 18), num_segments=shape["layers"])


def _parts(costs: dict[str, Cost]) -> list[str]:
    """The layers, and the head."""
    return list(dict.fromkeys(name.split(".")[0] for name in costs))


if __name__ == "__main__":
    main()
