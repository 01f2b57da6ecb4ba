"""Trains the embedded language model: `python -m benchmarks.embedded_model --out FOLDER`.

A LLaMA-style decoder with tied embeddings, AdamW, linear warm-up and a cosine decay to zero, on
random windows of the training stream. Writes four checkpoints of the run (weights rounded to
float16), the text sample and `card.json`, whose losses are those of the rounded weights. Takes about
a quarter of an hour on two cores; needs npm, or a copy of the corpus, and `fisherfunc[hf]`.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.embedded_model.corpus import (
    NPM_PACKAGE,
    Corpus,
    download_speeches,
    read_corpus,
    token_stream,
    train_tokenizer,
)
from benchmarks.embedded_model.losses import (
    checkpoint_loss,
    held_out_windows,
    next_token_loss,
    unigram_loss,
)
from fisherfunc.assets import CHECKPOINTS

_LOGGER = logging.getLogger("benchmarks.embedded_model")
_LOG_EVERY_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices that, with the corpus, fix the run."""

    seed: int = 0
    vocab_size: int = 1024
    context: int = 128
    batch_size: int = 16
    num_steps: int = 12_000
    num_warmup_steps: int = 100
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 100:
            raise ValueError(f"{self.num_steps} steps have no first percent; take at least 100")

    @property
    def checkpoint_steps(self) -> dict[str, int]:
        """Optimiser steps taken before each checkpoint: none, 1 %, 10 %, all."""
        last = self.num_steps
        return dict(zip(CHECKPOINTS, (0, last // 100, last // 10, last), strict=True))


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model at initialisation, drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config).train()


def new_optimiser(recipe: Recipe, model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms' gains alone."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    gains = [weight for weight in model.parameters() if weight.ndim == 1]
    groups: list[dict[str, object]] = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Linear warm-up times a cosine decay to zero, between 0 and 1."""
    warmup = min(1.0, (step + 1) / recipe.num_warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))


def random_batches(recipe: Recipe, tokens: Int[Tensor, " t"]) -> Iterator[Int[Tensor, "n s"]]:
    """Endless batches of windows that start anywhere in the stream."""
    generator = torch.Generator().manual_seed(recipe.seed)
    windows = tokens.unfold(0, recipe.context + 1, 1)
    while True:
        yield windows[torch.randint(len(windows), (recipe.batch_size,), generator=generator)]


def train(recipe: Recipe, model: LlamaForCausalLM, tokens: Int[Tensor, " t"]) -> Iterator[int]:
    """Train `model` in place.

    Args:
        recipe: Optimiser and schedule.
        model: Updated between two yields.
        tokens: The training stream.

    Yields:
        The number of steps taken so far, from 0 to `recipe.num_steps`.
    """
    optimiser = new_optimiser(recipe, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_factor(recipe, step))
    yield 0
    for step, batch in zip(range(1, recipe.num_steps + 1), random_batches(recipe, tokens), strict=False):
        loss = next_token_loss(model, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimiser.step()
        schedule.step()
        if step % _LOG_EVERY_STEPS == 0:
            _LOGGER.info("step %d of %d: loss %.3f", step, recipe.num_steps, loss.item())
        yield step


def save_checkpoint(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights in float16; the configuration's dtype has them load as float32."""
    weights = {name: weight.detach().half() for name, weight in model.named_parameters()}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written through a private temporary file


def run(recipe: Recipe, corpus: Corpus, out: Path) -> dict[str, Any]:
    """Train, and write checkpoints and text sample.

    Args:
        recipe: The choices of the run.
        corpus: The split speeches.
        out: Receives `sotu-llama/`, `sample.txt` and `card.json`.

    Returns:
        The card, as written.
    """
    tokenizer = train_tokenizer(corpus, vocab_size=recipe.vocab_size, max_length=recipe.context)
    tokens = token_stream(tokenizer, corpus.train)
    model = new_model(recipe, tokenizer)
    folders = {step: out / "sotu-llama" / name for name, step in recipe.checkpoint_steps.items()}
    started = time.perf_counter()
    for step in train(recipe, model, tokens):
        if step in folders:
            save_checkpoint(folders[step], model, tokenizer)
    seconds = time.perf_counter() - started
    (out / "sample.txt").write_text(corpus.sample, encoding="utf-8")
    card = {
        "data": _data_facts(corpus),
        "model": _model_facts(model),
        "training": _training_facts(recipe, tokens, seconds),
        **_losses(recipe, corpus, tokenizer, out),
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def _data_facts(corpus: Corpus) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(corpus.train.values()).encode())
    return {
        "source": f"npm package {NPM_PACKAGE}: State of the Union addresses, 1790 to 2021",
        "licence": "public domain: works of the United States Government; database PDDL 1.0, contents CC0 1.0",
        "training_speeches": len(corpus.train),
        "training_text_sha256": digest.hexdigest(),
        "held_out_speeches": list(corpus.held_out),
    }


def _model_facts(model: LlamaForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "architecture": "LlamaForCausalLM",
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "tied_embeddings": config.tie_word_embeddings,
        "stored_dtype": "float16",
    }


def _training_facts(recipe: Recipe, tokens: Int[Tensor, " t"], seconds: float) -> dict[str, Any]:
    return {
        "recipe": dataclasses.asdict(recipe),
        "training_tokens": len(tokens),
        "seconds": round(seconds),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def _losses(recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, out: Path) -> dict[str, Any]:
    """Nats per token on the held-out speeches, for the baselines and each stored checkpoint."""
    held_out = token_stream(tokenizer, corpus.held_out)
    windows = held_out_windows(held_out, context=recipe.context)
    unigram = unigram_loss(token_stream(tokenizer, corpus.train), windows, vocab_size=recipe.vocab_size)
    tokens_per_step = recipe.batch_size * recipe.context
    return {
        "held_out_tokens": windows[:, 1:].numel(),
        "uniform_loss": round(math.log(recipe.vocab_size), 4),
        "unigram_loss": round(unigram, 4),
        "checkpoints": {
            name: {
                "step": step,
                "tokens_seen": step * tokens_per_step,
                "held_out_loss": round(checkpoint_loss(out / "sotu-llama" / name, windows), 4),
            }
            for name, step in recipe.checkpoint_steps.items()
        },
    }


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Train the embedded language model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--corpus", type=Path, help="folder of speeches; fetched with npm if absent")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.num_steps)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = Recipe(seed=options.seed, num_steps=options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = read_corpus(options.corpus or download_speeches(Path(scratch)))
    options.out.mkdir(parents=True, exist_ok=True)
    _LOGGER.info("%s", json.dumps(run(recipe, corpus, options.out), indent=2))


if __name__ == "__main__":
    main()
