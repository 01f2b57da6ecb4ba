"""The words that architectures use for their parts: the only place that knows a model family's names.

Every table holds words or shell patterns for single components of a parameter's dotted name; the
patterns are matched in lower case. The outermost component that a table knows decides.
To teach the package a new family, add its words here; no code changes. Where the words come from:

=================  =========================================================================
``transformer.h``  GPT-2, GPT-J, GPT-Neo, BigCode, CodeGen, Falcon, Bloom
``model.layers``   LLaMA, Mistral, Mixtral, Qwen, Gemma, Phi, OLMo, DeepSeek, StableLM, Granite
``encoder.layer``  BERT, RoBERTa, ELECTRA, DeBERTa (and ``decoder.layers``: OPT)
``encoder.block``  T5 and mT5; with ``encoder.layers``: BART, Pegasus, Whisper, CLIP, nn.Transformer
others             ``gpt_neox.layers``, ``transformer.layer`` (DistilBERT, XLNet), ``vit.layers``,
                   ``albert_layer_groups``, ``transformer.blocks`` (MPT), ``backbone.layers`` (Mamba)
=================  =========================================================================
"""

import re
from collections.abc import Mapping
from fnmatch import translate
from types import MappingProxyType
from typing import Final

Vocabulary = Mapping[str, re.Pattern[str]]


def _words(blank_separated: str) -> frozenset[str]:
    return frozenset(blank_separated.split())


def _any_of(patterns: str) -> re.Pattern[str]:
    """Compile blank-separated shell patterns into one expression, to be used with ``match``."""
    return re.compile("|".join(translate(pattern) for pattern in patterns.split()))


# Containers of a repeated stack, and what one of its members is called in a label.
STACKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("h", "layer", "layers", "block", "blocks", "resblocks"), "layer"),
        **dict.fromkeys(("albert_layer_groups",), "layer"),
        **dict.fromkeys(("stage", "stages"), "stage"),
    }
)

# Halves of a model whose layers stay apart.
STREAMS: Final = _words("encoder decoder")

# Sub-models that live next to each other: they stay in the label, unlike backbones.
TOWERS: Final = _words("audio_tower language_model text_model vision_model vision_tower visual")

# Names of the one body of a model. They say nothing about the depth and are left out of labels.
BACKBONES: Final = _words(
    """
    model transformer backbone
    albert beit bert convnext deberta deit dinov2 distilbert electra esm funnel gpt_neox layoutlm
    longformer mobilebert mpnet resnet roberta rwkv swin vit wav2vec2
    """
)

# Components that wrap a module without being one: torch.compile, data parallelism, FSDP, checkpointing.
WRAPPERS: Final = _words("_orig_mod module _fsdp_wrapped_module _checkpoint_wrapped_module")

# Leading components that wrap a whole model: PEFT and Sentence Transformers.
WRAPPING_PREFIXES: Final = (("base_model", "model"), ("0", "auto_model"))

# Where a path leaves the module and enters what an adapter (PEFT) added to it.
ADAPTERS: Final = _any_of("base_layer lora_* ia3_* modules_to_save original_module")

NORMALIZATION: Final = _any_of("*norm* ln ln[0-9_]* *_ln bn bn[0-9]*")

# Norms that close a stack when they stand outside it; numbered ones (bn1, norm1) belong elsewhere.
FINAL_NORM: Final = _any_of("norm norm_f ln_f ln_out ln_post ln_final layernorm layer_norm *final*norm post_layernorm")

_ATTENTION: Final = """
    *attn* *attention* *qkv* [qkvo]_proj out_proj in_proj_weight in_proj_bias [qkv]_proj_weight bias_[kv]
"""
_MIXER: Final = "*mixer* mamba* ssm*"
_MLP: Final = """
    *mlp* *ffn* *feed_forward* *feedforward* densereludense ff *moe* *expert*
    fc[0-9] linear[12] gate_proj up_proj down_proj gate_up_proj
"""
_EMBEDDING: Final = "*embed* emb *_emb wte wpe *_token *_tokens"
_OUTPUT: Final = """
    head heads *_head lm_loss embed_out *unembed* project_out proj_out output
    *prediction* cls vocab_transform vocab_layer_norm vocab_projector
    score *classifier* qa_outputs *pooler* *_summary text_projection visual_projection
"""

# Projections of attention to queries, keys and values, in this order, as modules of one attention module.
SEPARATE_PROJECTIONS: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
)

# One projection to all three, and what its rows are ordered by first (see models/heads.py).
FUSED_PROJECTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {"c_attn": "parts first", "Wqkv": "parts first", "qkv_proj": "parts first", "query_key_value": "heads first"}
)

# The projection of the heads' outputs.
ATTENTION_OUTPUTS: Final = ("o_proj", "out_proj", "c_proj", "o", "out_lin", "Wo", "dense")

# Attention to another stream, of a layer that also has attention to its own.
CROSS_ATTENTION: Final = _any_of("cross* encdec* encoder_attn")

# Parts of one layer. Here a `query` is no search text, and `output` is the second half of BERT's MLP.
INSIDE: Final[Vocabulary] = MappingProxyType(
    {
        "attention": _any_of(f"{_ATTENTION} query key value"),
        "mixer": _any_of(_MIXER),
        "mlp": _any_of(f"{_MLP} router gate intermediate* output"),
        "embedding": _any_of(_EMBEDDING),
    }
)

# Parts around the stack. `output` comes first: GPT-NeoX's `embed_out` is no embedding. `shared` is
# T5's and BART's word embedding, `project_in` OPT's; CLIP normalises its embeddings before the stack.
ENDS: Final[Vocabulary] = MappingProxyType(
    {
        "output": _any_of(_OUTPUT),
        "embedding": _any_of(f"{_EMBEDDING} shared project_in pre_layrnorm"),
    }
)

# Every part, for what stands around a stack or in a model without one.
OUTSIDE: Final[Vocabulary] = MappingProxyType(
    {**ENDS, "attention": _any_of(_ATTENTION), "mixer": _any_of(_MIXER), "mlp": _any_of(_MLP)}
)
