"""Tiny models of many architectures with awkward batches: right padding, −100 holes, one-token sequences."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from plain_modules import VOCAB, Shared, TinyAttention, TinyLSTM, TinyResNet, cnn, encoder, mlp
from torch import nn


@dataclass(frozen=True)
class Case:
    """A model, a batch and the loss it has; `casts` where the model casts to float32 inside, even as `.double()`."""

    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    casts: bool = False


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, shape)


def causal_batch() -> dict[str, torch.Tensor]:
    """Three sequences: full, padded to three tokens with a hole, and one with a single valid token."""
    ids = token_ids(3, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    labels = ids.clone()
    labels[1, 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def masked_batch() -> dict[str, torch.Tensor]:
    batch = causal_batch()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, [1, 4]], labels[1, [0, 5]], labels[2, 1] = token_ids(2), token_ids(2), token_ids(1)
    return {**batch, "labels": labels}  # the target at [1, 5] is padding, so it does not count


def seq2seq_batch() -> dict[str, torch.Tensor]:
    labels = token_ids(2, 4)
    labels[1, 2:] = -100
    return {
        "input_ids": token_ids(2, 5),
        "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2]),
        "labels": labels,
    }


def image_batch() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 2, 1])}


def _hf(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = getattr(transformers, config)(**{**ids, **options})
    if "num_local_experts" in options:
        settings._experts_implementation = "eager"  # for the oracle: the grouped products have no float64
    return getattr(transformers, model)(settings)


BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
GROUPED = {**BASE, "num_key_value_heads": 1, "head_dim": 8}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 1,
}


def _samples(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, *shape), torch.tensor([0, 1, 2, 1])


CASES: dict[str, Case] = {
    "gpt2": Case(
        "causal_lm",
        partial(
            _hf,
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
        ),
        causal_batch,
    ),
    "gpt_neox": Case("causal_lm", partial(_hf, "GPTNeoXForCausalLM", "GPTNeoXConfig", **BASE), causal_batch),
    "opt": Case(
        "causal_lm",
        partial(_hf, "OPTForCausalLM", "OPTConfig", **BASE, ffn_dim=24, word_embed_proj_dim=16),
        causal_batch,
    ),
    "llama": Case("causal_lm", partial(_hf, "LlamaForCausalLM", "LlamaConfig", **GROUPED), causal_batch, casts=True),
    "mistral": Case(
        "causal_lm",
        partial(_hf, "MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=3),
        causal_batch,
        casts=True,
    ),
    "qwen3": Case("causal_lm", partial(_hf, "Qwen3ForCausalLM", "Qwen3Config", **GROUPED), causal_batch, casts=True),
    "gemma2": Case("causal_lm", partial(_hf, "Gemma2ForCausalLM", "Gemma2Config", **GROUPED), causal_batch, casts=True),
    "gemma3": Case(
        "causal_lm",
        partial(_hf, "Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED),
        causal_batch,
        casts=True,
    ),
    "phi": Case("causal_lm", partial(_hf, "PhiForCausalLM", "PhiConfig", **BASE), causal_batch, casts=True),
    "falcon": Case("causal_lm", partial(_hf, "FalconForCausalLM", "FalconConfig", **BASE), causal_batch, casts=True),
    "bloom": Case(
        "causal_lm",
        partial(_hf, "BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2),
        causal_batch,
        casts=True,
    ),
    "mixtral": Case(
        "causal_lm",
        partial(_hf, "MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=3, num_experts_per_tok=2),
        causal_batch,
        casts=True,
    ),
    "mamba": Case(
        "causal_lm",
        partial(
            _hf,
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
        ),
        causal_batch,
        casts=True,
    ),
    "bert": Case("masked_lm", partial(_hf, "BertForMaskedLM", "BertConfig", **BASE), masked_batch),
    "roberta": Case("masked_lm", partial(_hf, "RobertaForMaskedLM", "RobertaConfig", **BASE), masked_batch),
    "deberta_v2": Case(
        "masked_lm",
        partial(
            _hf,
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **BASE,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        masked_batch,
        casts=True,
    ),
    "albert": Case(
        "masked_lm", partial(_hf, "AlbertForMaskedLM", "AlbertConfig", **BASE, embedding_size=8), masked_batch
    ),
    "distilbert": Case(
        "masked_lm",
        partial(
            _hf,
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
        ),
        masked_batch,
    ),
    "vit": Case(
        "classification",
        partial(_hf, "ViTForImageClassification", "ViTConfig", **BASE, image_size=8, patch_size=4, num_labels=3),
        image_batch,
    ),
    "t5": Case(
        "seq2seq_lm",
        partial(
            _hf,
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=16,
            d_ff=24,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        seq2seq_batch,
        casts=True,
    ),
    "bart": Case("seq2seq_lm", partial(_hf, "BartForConditionalGeneration", "BartConfig", **SEQ2SEQ), seq2seq_batch),
    "whisper": Case(
        "seq2seq_lm",
        partial(
            _hf,
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQ2SEQ,
            num_mel_bins=4,
            max_source_positions=5,
            max_target_positions=8,
        ),
        lambda: {"input_features": torch.randn(2, 4, 10), "labels": seq2seq_batch()["labels"]},
        casts=True,
    ),
    "mlp": Case("classification", mlp, lambda: _samples(4)),
    "cnn": Case("classification", cnn, lambda: _samples(1, 8, 8)),
    "resnet": Case("classification", TinyResNet, lambda: _samples(1, 6, 6)),
    "lstm": Case("causal_lm", TinyLSTM, causal_batch),
    "multihead": Case("classification", TinyAttention, lambda: _samples(5, 8)),
    "encoder": Case("classification", encoder, lambda: _samples(5, 8)),
    "shared": Case("regression", Shared, lambda: (torch.randn(4, 5), torch.randn(4, 2))),
}


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, Any]:
    """The model of a case with noise in every parameter, so that nothing is zero by design, and its batch."""
    torch.manual_seed(seed)
    model = CASES[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype), cast(CASES[name].batch(), dtype)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Floating-point entries in `dtype`."""
    if isinstance(batch, tuple):
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


class Shifted(nn.Module):
    """Ids to logits `(b, v, s)` of the next token, as `nn.CrossEntropyLoss` wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits[:, :-1].mT


def two_batches(name):
    """A model, several batches of it (of two lengths where they have one) and the kind of its loss."""
    model, batch = build(name)
    if isinstance(batch, tuple):
        return model, [batch, batch], CASES[name].kind
    return model, [{key: x[:, :length] for key, x in batch.items()} for length in (5, 3)], CASES[name].kind
