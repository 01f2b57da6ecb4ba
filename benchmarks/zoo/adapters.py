"""The adapters of PEFT, each on a tiny LLaMA: every type of its own mapping, and the variants of LoRA."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case, attention_mask, checked, ids, perturbed
from benchmarks.zoo.language import LENGTHS, WIDTH
from benchmarks.zoo.tiny import END, PADDING, START, VOCAB

_EVERY: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "num_virtual_tokens": 3, "r": 4}
_OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "OFT": {"r": 0, "oft_block_size": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6, 7]},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "POLY": {"n_tasks": 2},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 64},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
}
_OF_TASKS = ("MULTITASK_PROMPT_TUNING", "POLY")
_VARIANTS: dict[str, dict[str, Any]] = {
    "LORA dora": {"use_dora": True},
    "LORA rslora": {"use_rslora": True},
    "LORA bias": {"lora_bias": True},
    "LORA modules_to_save": {"modules_to_save": ["lm_head"]},
    "LORA embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "LORA trainable_token_indices": {"trainable_token_indices": [5, 6, 7]},
    "LORA layers_to_transform": {"layers_to_transform": [1]},
    "LORA all-linear": {"target_modules": "all-linear"},
}


def names() -> list[str]:
    """The types of PEFT; none where it is not installed."""
    if find_spec("peft") is None:
        return []
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return [*(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING), *_VARIANTS]


def build(name: str, dtype: torch.dtype) -> Case:
    """The case of an adapter."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made_by = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = name.split()[0]
    takes = made_by[kind].__dataclass_fields__
    options = {**_EVERY, **_OPTIONS.get(kind, {}), **_VARIANTS.get(name, {})}
    config = made_by[kind](task_type="CAUSAL_LM", **{key: value for key, value in options.items() if key in takes})
    model = peft.get_peft_model(_llama(), config)
    batch = {"input_ids": ids(len(LENGTHS), WIDTH), "attention_mask": attention_mask(LENGTHS, WIDTH)}
    batch["labels"] = batch["input_ids"].clone()
    if kind in _OF_TASKS:
        batch["task_ids"] = torch.tensor([0, 1, 0])
    if isinstance(config, peft.PromptLearningConfig):
        model = _OwnPositions(model)
    return Case(model=perturbed(checked(model)).to(dtype), batch=batch, loss="causal_lm")


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=PADDING,
            bos_token_id=START,
            eos_token_id=END,
        )
    )


class _OwnPositions(nn.Module):
    """Predictions at the text's own positions: those of virtual tokens come before them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, **others: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids, **others).logits[:, -input_ids.shape[1] :]
