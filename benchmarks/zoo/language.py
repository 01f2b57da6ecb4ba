"""The language models of Transformers: all causal, masked and sequence-to-sequence architectures in its mappings."""

import inspect
import sys
from functools import cache
from typing import Any

import torch

from benchmarks.zoo.case import Case, NotTinyError, attention_mask, checked, ids, perturbed
from benchmarks.zoo.tiny import tiny_config

KINDS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "causal_lm"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "masked_lm"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "seq2seq_lm"),
}
WIDTH, LENGTHS = 6, [6, 4, 5]
_TARGETS, _TARGET_LENGTHS = 4, [4, 2, 3]
_OWN_DECODER_INPUTS = ("FSMTForConditionalGeneration",)  # which does not shift its labels into its decoder
_AT = {"perceiver": 8, "nystromformer": 8}  # widths of what takes one width alone


@cache
def names(kind: str) -> dict[str, str]:
    """{architecture: class}."""
    sys.modules.setdefault("torchvision", None)  # see benchmarks/preload.py
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, KINDS[kind][0]))


def build(kind: str, name: str, dtype: torch.dtype) -> Case:
    """The case of an architecture.

    Raises:
        NotTinyError: If it has no configuration of its own, or its smallest model is large.
    """
    import transformers

    loss = KINDS[kind][1]
    if name not in transformers.CONFIG_MAPPING:
        raise NotTinyError("it has no configuration in Transformers")
    made_for = getattr(transformers, names(kind)[name])
    config = tiny_config(name, transformers.CONFIG_MAPPING[name])
    text = getattr(config, "sub_configs", {}).get("text_config")
    if text is not None and text is made_for.config_class:  # what Transformers' own automatic classes do
        config = config.get_text_config()
    if loss == "seq2seq_lm" and not config.is_encoder_decoder:
        loss = "causal_lm"  # a decoder with an encoder of sound in front of it
    if hasattr(config, "is_decoder") and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = loss == "causal_lm"
    model = perturbed(checked(made_for(config))).to(dtype)
    return Case(model=model, batch=_batch(loss, model, _AT.get(name, WIDTH)), loss=loss)


def _batch(loss: str, model: Any, width: int) -> dict[str, torch.Tensor]:
    takes = inspect.signature(model.forward).parameters
    batch = {"input_ids": ids(len(LENGTHS), width)}
    mask = attention_mask(LENGTHS, width)
    if "attention_mask" in takes:
        batch["attention_mask"] = mask
    if loss == "causal_lm":
        return {**batch, "labels": batch["input_ids"].clone()}
    if loss == "seq2seq_lm":
        labels = ids(len(LENGTHS), _TARGETS)
        if type(model).__name__ in _OWN_DECODER_INPUTS:
            batch["decoder_input_ids"] = ids(len(LENGTHS), _TARGETS)
        return {**batch, "labels": labels.where(attention_mask(_TARGET_LENGTHS, _TARGETS).bool(), -100)}
    labels = torch.full((len(LENGTHS), width), -100)
    for row, column in ((0, 1), (0, 4), (1, 0), (1, 3), (2, 2)):
        labels[row, column] = ids(1)
    return {**batch, "labels": labels}
