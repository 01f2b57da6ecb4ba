"""Tiny Hugging Face folders, written by `save_pretrained`, each with a word-level tokenizer of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

WORDS = 40
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>")
VOCAB = len(SPECIAL) + WORDS
CONTEXT = 32
TASKS = {"gpt2": "causal_lm", "bert": "masked_lm", "t5": "seq2seq_lm"}


def sentence(length: int) -> str:
    """So many words, hence so many tokens."""
    return " ".join(f"w{(7 * index * index + 3 * index) % WORDS}" for index in range(length))


def tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{index}" for index in range(WORDS))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    if kind == "bert":
        around = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        core.post_processor = around
        options |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    if kind == "t5":
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 5)])
        options |= {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def model(kind: str) -> Any:
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT))
    if kind == "bert":
        return hf.BertForMaskedLM(
            hf.BertConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=CONTEXT,
            )
        )
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def write(kind: str, folder: Path, *, with_tokenizer: bool = True, **options: Any) -> Path:
    """Save a tiny model of a kind ("gpt2", "bert", "t5") into a folder."""
    model(kind).save_pretrained(folder, **options)
    if with_tokenizer:
        tokenizer(kind).save_pretrained(folder)
    return folder


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
