"""A tiny configuration of any architecture of Transformers: the default one, with its sizes shrunk by their names.

What a size is called says what it may be (`RULES`, first match wins); layers that differ keep one of each kind. The few
architectures whose sizes are tied to each other have a line in `EXCEPTIONS`, keys of sub-configurations dotted.
"""

import re
from collections.abc import Mapping
from typing import Any

VOCAB = 64
FIRST_ID, LAST_ID = 4, 40  # ids that batches are drawn from: below are start, end and padding, above what is special
PADDING, START, END = 0, 1, 2
_SPECIAL = ("_token_id", "_token_index", "_token_ids", "mask_index", "unk_index")
_ROLES = {"pad_token_id": PADDING, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
_NO_SIZES = {
    "transformers_version",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "per_layer_config",
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_MOST_LAYERS = 4

RULES: tuple[tuple[str, int], ...] = (
    (r"offset|ratio|factor|rate|stride|kernel|seed|multiplier|distance|theta|scal|capacity|hop_length|_iters", 10**9),
    (r"type_vocab", 4),
    (r"vocab|codebook_size", VOCAB),
    (r"position|n_ctx|max_seq|context_length|model_max_length", 64),
    (r"per_tok(en)?$|top_?k$|moe_k$", 2),
    (r"topk_group|^n_groups?$|num_expert_group|o_groups", 1),
    (r"expert_num|num_.*experts|n_routed_experts|^num_experts", 4),
    (r"(key_value|kv)_heads|query_groups", 2),
    (r"heads_per_ngram", 2),
    (r"qk_head_dim", 16),
    (r"head_dim|head_size|d_kv|_d_head|^d_head|headdim|dim_head|kv_channels|nope_head|^rotary_dim", 8),
    (r"heads?$", 4),
    (r"rank", 8),
    (r"buckets|extent", 8),
    (r"window|chunk_size|chunk_length", 4),
    (r"(^|_)layers?$|n_layers?$|depth$|^num_blocks$|layers_per_stack", 2),
    (r"image_size|crop_size", 16),
    (r"patch_size", 8),
    (r"mel_bins|num_filters", 8),
    (r"intermediate|ffn|d_ff|^dff|d_inner|inner_dim|mlp_dim|feed_forward_size|dim_ff|emb_size|embedding_size", 32),
    (r"hidden|d_model|n_embd|dim$|width$|channels?$|state|proj_size|units$|size_global|d_latents|bottleneck|d_ssm", 32),
    (r"num_hash|num_landmarks|num_latents|num_centroids|d_rel|codevectors", 8),
)

_LONE_HEADS = {"head_dim": 8}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_ALTERNATING = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": _LONE_HEADS,
    "hunyuan_v1_dense": _LONE_HEADS,
    "hunyuan_v1_moe": _LONE_HEADS,
    "nemotron": {**_LONE_HEADS, "num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "rwkv": {"use_cache": False},  # its state is written in place: with a cache it has no backward pass
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "use_cache": False},
    "mobilebert": {"embedding_size": 16},  # smaller than the hidden size: else one of its weights is empty
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ALTERNATING, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        **_ALTERNATING,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esm": {"vocab_size": VOCAB, "pad_token_id": PADDING, "mask_token_id": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemo_speechlm": {"chunk_length": 500},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "blt": {"use_cache": False},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {f"text_config.{key}": value for key, value in _INDEXER.items()},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "perceiver": {"max_position_embeddings": 8},
    "mpnet": {"relative_attention_num_buckets": 32},  # which its code has as a constant, too
    "neomme": {"head_dim": 16},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "reformer": {"axial_pos_shape": [4, 16], "axial_pos_embds_dim": [8, 24]},
}


def tiny_config(kind: str, config_class: Any) -> Any:
    """The tiny configuration of an architecture.

    Args:
        kind: Its name in the mappings of Transformers.
        config_class: Of its configuration.
    """
    sizes = _shrunk(config_class().to_dict(), _Ids())
    for key, value in EXCEPTIONS.get(kind, {}).items():
        place = sizes
        *path, last = key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    config = config_class(**sizes)
    if getattr(config, "is_encoder_decoder", False):
        for role in ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, role, None) is None:
                setattr(config, role, _ROLES[role])
    for part in (config, *(getattr(config, name, None) for name in ("text_config", "decoder", "encoder"))):
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"  # the grouped products have no float64
    return config


class _Ids:
    """Special ids, one after the other, beside those that batches are drawn from."""

    def __init__(self) -> None:
        self._given: dict[int, int] = {}

    def __call__(self, old: int) -> int:
        return self._given.setdefault(old, LAST_ID + len(self._given) % (VOCAB - LAST_ID))


def _shrunk(config: Mapping[str, Any], ids: _Ids) -> dict[str, Any]:
    kept = _layers(config)
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _NO_SIZES:
            continue
        if isinstance(value, Mapping) and "model_type" in value:
            found[key] = _shrunk(value, ids)
        elif key in _ROLES:
            found[key] = None if value is None else _ROLES[key]
        elif key.endswith(_SPECIAL) and isinstance(value, int) and not isinstance(value, bool):
            found[key] = ids(value)
        elif isinstance(value, list) and len(value) == _num_layers(config):
            found[key] = [value[layer] for layer in kept]
            found[key] = [_size(key, v) if isinstance(v, int) else v for v in found[key]]
        elif key in _LAYERS:
            found[key] = len(kept) if isinstance(value, int) and value == _num_layers(config) else _size(key, value)
        else:
            found[key] = _size(key, value)
    if "num_key_value_heads" in found and config["num_key_value_heads"] == config.get("num_attention_heads"):
        found["num_key_value_heads"] = found["num_attention_heads"]  # each head has keys of its own
    return found


def _num_layers(config: Mapping[str, Any]) -> int:
    return next((config[name] for name in _LAYERS if isinstance(config.get(name), int)), 2)


def _layers(config: Mapping[str, Any]) -> list[int]:
    """Which layers stay: the first of each kind, at least two."""
    total = _num_layers(config)
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == total]
    kinds = [repr([v[layer] for v in lists]) for layer in range(total)]
    first = [layer for layer in range(total) if kinds.index(kinds[layer]) == layer][:_MOST_LAYERS]
    more = [layer for layer in range(total) if layer not in first]
    return sorted(first + more[: max(0, 2 - len(first))])


def _size(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    limit = next((limit for pattern, limit in RULES if re.search(pattern, key)), 10**9)
    return min(value, limit)
