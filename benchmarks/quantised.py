"""Adapters on bases that libraries quantised: their Grams beside those of a loop over tokens.

    pip install --no-deps bitsandbytes optimum-quanto torchao  # those that are not installed are named, and left out
    python -m benchmarks.quantised

A small Llama at random weights, and LoRA by PEFT on it, in float32 on the CPU. The loop is plain autograd: a backward
pass of each token. Its own sensitivity stands beside: by how much its Gram moves when all embeddings are
changed by 1e-7, −1e-7 and 3e-7, the largest of the three. Where activations are rounded to eight bits, that can be a
step.
"""

import importlib
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import fisherfunc as ff

VOCABULARY, SEQUENCES, LENGTH = 40, 3, 12
CHANGES = (1e-7, -1e-7, 3e-7)
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}


def _bitsandbytes(folder: str, **settings: Any) -> nn.Module:
    quantisation = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, device_map="cpu", dtype=torch.float32
    )


def _plain(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _quanto(folder: str, weights: str) -> nn.Module:
    quanto = importlib.import_module("optimum.quanto")
    model = _plain(folder)
    quanto.quantize(model, weights=getattr(quanto, weights), exclude="lm_head")
    quanto.freeze(model)
    return model


def _torchao(folder: str) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    model = _plain(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


BASES: dict[str, tuple[str, Callable[[str], nn.Module]]] = {
    "bitsandbytes int8": ("bitsandbytes", lambda f: _bitsandbytes(f, load_in_8bit=True)),
    "bitsandbytes nf4": ("bitsandbytes", lambda f: _bitsandbytes(f, **FOUR_BITS, bnb_4bit_quant_type="nf4")),
    "bitsandbytes fp4": ("bitsandbytes", lambda f: _bitsandbytes(f, **FOUR_BITS, bnb_4bit_quant_type="fp4")),
    "bitsandbytes nf4, scales quantised": (
        "bitsandbytes",
        lambda f: _bitsandbytes(f, **FOUR_BITS, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes nf4, stored as bfloat16": (
        "bitsandbytes",
        lambda f: _bitsandbytes(f, **FOUR_BITS, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16),
    ),
    "quanto int8": ("optimum.quanto", lambda f: _quanto(f, "qint8")),
    "torchao int8": ("torchao", _torchao),
}


def _adapted(base: nn.Module) -> nn.Module:
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, settings).eval()


def _loop(model: nn.Module, ids: torch.Tensor, change: float = 0.0) -> torch.Tensor:
    """The Gram of the adapter's parameters, by one backward pass a token."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for sequence in ids:
        embedded = model.get_input_embeddings()(sequence[None]).detach() * (1 + change)
        logits = model(inputs_embeds=embedded).logits[0, :-1]
        for loss in nn.functional.cross_entropy(logits, sequence[1:], reduction="none"):
            found = torch.autograd.grad(loss, leaves, retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in found]).double())
    gradients = torch.stack(rows)
    return gradients @ gradients.T


def measured(model: nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """How far the Gram is from the loop's, and how far that moves by itself, both over its largest entry."""
    want = _loop(model, ids)
    fn = ff.functionalize(model)
    grams = ff.token_grams(fn, fn.params, {"input_ids": ids, "labels": ids}, ff.losses.causal_lm())
    got = grams.block(list(grams.grams)).double()
    moved = max(float((_loop(model, ids, change) - want).abs().max()) for change in CHANGES)
    largest = float(want.diagonal().max())
    return float((got - want).abs().max()) / largest, moved / largest


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line at each call, of casts that are its own
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    print("| base | weights held as | Gram − loop's | the loop's own, inputs × (1 ± 1e-7, 1 + 3e-7) |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for name, (library, load) in BASES.items():
            try:
                importlib.import_module(library)
            except ImportError as error:
                print(f"| {name} | not run: {error} | | |")
                continue
            model = _adapted(load(folder))
            weight = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").weight
            difference, moved = measured(model, ids)
            print(f"| {name} | {type(weight).__name__}, {weight.dtype} | {difference:.0e} | {moved:.0e} |", flush=True)


if __name__ == "__main__":
    main()
