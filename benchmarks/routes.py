"""Both routes against a loop of backward passes: `python -m benchmarks.routes [--quick] [--out FILE]`.

Five ways to the same Grams, each in a process of its own, so that one peak of memory does not hide another:

- loop: one forward pass a sequence, one ordinary backward pass a token, all rows held; then the Grams.
- rows: `ff.per_token_gradients`, all rows held; then the Grams.
- factored: `ff.token_grams`, no gradient of a large tensor formed.
- dense: `ff.token_grams(route="dense")`, one slab of columns at a time; here one slab is enough.
- limited: the same within a quarter of the memory that all rows take: more slabs, each with backward passes of its own.

Seconds are the least of the repetitions; memory is the peak beyond what the process held before, model included. Each
ratio is against the loop of the same run. `error` is ‖K − K_loop‖/‖K_loop‖: a fast wrong answer would show.
"""

import argparse
import json
import multiprocessing
import platform
import resource
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.linalg.gram import gram_of

CONTEXT = 64
SEQUENCES = {"quick": {"embedded": 2, "gpt2": 2}, "full": {"embedded": 8, "gpt2": 4}}
REPEATS = {"quick": 1, "full": 3}
_MIB = 2**20


def embedded(num_sequences: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The embedded model and the beginning of its sample text."""
    from fisherfunc.models.huggingface import load, text_batches

    loaded = load(assets.checkpoint())
    count = num_sequences * (CONTEXT - 1)
    text = assets.sample_text().read_text(encoding="utf-8")
    return loaded.model, text_batches(loaded.tokenizer, text, task=loaded.task, context=CONTEXT, num_tokens=count)[0]


def gpt2(num_sequences: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A GPT-2 of 4 layers, width 256 and 5,000 words, at initialisation, on random words."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 5000, "n_positions": CONTEXT}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(5000, (num_sequences, CONTEXT))}


MODELS: dict[str, Callable[[int], tuple[nn.Module, dict[str, Tensor]]]] = {"embedded": embedded, "gpt2": gpt2}


def by_loop(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The full Gram, by ordinary backward passes on the module itself."""
    parameters = dict(model.named_parameters())
    sequences, positions = batch["input_ids"].shape
    rows = {name: torch.empty(sequences * (positions - 1), p.numel()) for name, p in parameters.items()}
    token = 0
    for ids in batch["input_ids"]:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        for loss in nn.functional.cross_entropy(logits, ids[1:], reduction="none"):
            gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                rows[name][token] = gradient.flatten()
            token += 1
    return _full(rows)


def by_rows(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The full Gram, by `ff.per_token_gradients`."""
    fn = ff.functionalize(model)
    rows = ff.per_token_gradients(fn, fn.params, batch, ff.losses.causal_lm())
    return _full({name: g.flatten(1) for name, g in rows.items()})


def by_factors(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The full Gram, by the factored route of `ff.token_grams`."""
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm()).block()


def by_slabs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The full Gram, by the dense route of `ff.token_grams`."""
    fn = ff.functionalize(model)
    return ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm(), route="dense").block()


def by_limited_slabs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The full Gram, by the dense route in a quarter of the memory of all rows."""
    fn = ff.functionalize(model)
    sequences, positions = batch["input_ids"].shape
    limit = sequences * (positions - 1) * sum(4 * p.numel() for p in fn.params.values()) // 4
    return ff.token_grams(fn, fn.params, batch, ff.losses.causal_lm(), route="dense", memory_limit=limit).block()


WAYS = {"loop": by_loop, "rows": by_rows, "factored": by_factors, "dense": by_slabs, "limited": by_limited_slabs}


def _full(rows: dict[str, Tensor]) -> Tensor:
    return sum((gram_of(g, dtype=torch.float64) for g in rows.values()), start=torch.tensor(0.0))


def measure(model_name: str, way: str, num_sequences: int, repeats: int) -> dict[str, Any]:
    """Time and peak memory of one way, in this process, and the Gram it gave."""
    model, batch = MODELS[model_name](num_sequences)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        begin = perf_counter()
        gram = WAYS[way](model, batch)
        seconds.append(perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    size = sum(p.numel() for p in model.parameters())
    return {"seconds": min(seconds), "peak_mib": peak / 1024, "gram": gram.numpy(), "num_params": size}


def compare(model_name: str, num_sequences: int, repeats: int) -> dict[str, Any]:
    """All ways on one model, each in a fresh process, with ratios against the loop."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        runs = {way: pool.submit(measure, model_name, way, num_sequences, repeats).result() for way in WAYS}
    truth = torch.from_numpy(runs["loop"]["gram"])
    num_tokens, num_params = len(truth), runs["loop"]["num_params"]
    return {
        "num_tokens": num_tokens,
        "num_params": num_params,
        "rows_mib": 4 * num_tokens * num_params / _MIB,
        "ways": {way: _against(runs["loop"], run, truth) for way, run in runs.items()},
    }


def _against(loop: Mapping[str, Any], run: Mapping[str, Any], truth: Tensor) -> dict[str, float]:
    error = torch.linalg.matrix_norm(torch.from_numpy(run["gram"]) - truth) / torch.linalg.matrix_norm(truth)
    return {
        "seconds": round(run["seconds"], 3),
        "peak_mib": round(run["peak_mib"], 1),
        "time_ratio": round(run["seconds"] / loop["seconds"], 3),
        "memory_ratio": round(run["peak_mib"] / loop["peak_mib"], 3),
        "error": float(f"{error.item():.1e}"),
    }


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Both routes against a loop of backward passes.")
    parser.add_argument("--quick", action="store_true", help="fewer tokens, once: under a minute on two cores")
    parser.add_argument("--out", type=Path, help="file for the JSON; standard output if absent")
    options = parser.parse_args()
    size = "quick" if options.quick else "full"
    found = {
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        },
        "models": {name: compare(name, count, REPEATS[size]) for name, count in SEQUENCES[size].items()},
    }
    text = json.dumps(found, indent=1)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
