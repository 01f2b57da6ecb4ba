"""Hugging Face language models: a folder or a hub id in; the model, its tokenizer and its task out.

A model comes with the weights that its files hold, or not at all: a tensor that the files lack is an error,
never a random initialisation. Transformers is imported when a function is called, not before. Text becomes
batches in windows.py.
"""

import json
import re
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fisherfunc.models.adapters import CONFIG as ADAPTER_CONFIG
from fisherfunc.models.adapters import adapter_in, with_adapter
from fisherfunc.models.reading import brief, reading
from fisherfunc.models.usable import check_decoder_start, check_finite
from fisherfunc.models.windows import num_valid_tokens, text_batches, text_windows

__all__ = ["TASKS", "LoadedModel", "load", "max_context", "num_valid_tokens", "task_of", "text_batches", "text_windows"]

TASKS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}
_SUFFIXES = (("ForMaskedLM", "masked_lm"), ("ForCausalLM", "causal_lm"), ("LMHeadModel", "causal_lm"))
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_UNLIMITED = 1_000_000
_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A language model, ready to be differentiated, and what goes with it.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        task: A key of `TASKS`.
        name: The folder or the hub id that it came from.
        max_context: The most positions it takes, or None where its files name no limit.
        adapter_of: The base of a PEFT adapter, whose parameters alone are trainable; None for a whole model.
    """

    model: Any
    tokenizer: Any
    task: str
    name: str
    max_context: int | None
    adapter_of: str | None = None


def load(
    model_id_or_folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Read a causal, masked or sequence-to-sequence language model and its tokenizer.

    Args:
        model_id_or_folder: A folder that `save_pretrained` wrote, of a model or of a PEFT adapter whose base is here,
            or else a hub id.
        dtype: The dtype of the weights.
        device: Where to put them.

    Raises:
        ImportError: If Transformers, or something that this model needs, is not installed.
        FileNotFoundError: If there is no such folder, it lacks a file, or it is an adapter whose base is not here.
        OSError: If the hub does not give the model.
        ValueError: If a file is corrupt, a weight is missing, misshapen or not finite, the model is quantised without
            an adapter on it, needs code of its own or is no language model, or the device cannot be used.
    """
    transformers = _transformers()
    name = str(model_id_or_folder)
    place = _located(model_id_or_folder)
    _check_device(device)
    adapter = adapter_in(place)
    whole = place if adapter is None else adapter.base
    with reading("configuration", name):
        config = transformers.AutoConfig.from_pretrained(whole, trust_remote_code=False)
    task = task_of(config, name=name, adapted=adapter is not None)
    model = _weights(getattr(transformers, TASKS[task]), whole, name, dtype)
    if adapter is not None:
        with reading("adapter", name):
            model = with_adapter(model, adapter, dtype=dtype)
    check_finite(model, name)
    if task == "seq2seq_lm":
        check_decoder_start(model, name)
    tokenizer = _tokenizer(transformers, place if adapter is None or _has_tokenizer(place) else whole, name)
    return LoadedModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        task=task,
        name=name,
        max_context=max_context(model, tokenizer),
        adapter_of=None if adapter is None else adapter.base,
    )


def task_of(config: Any, *, name: str = "the model", adapted: bool = False) -> str:
    """What a model was made for, from its configuration: a key of `TASKS`.

    Args:
        config: A Transformers configuration.
        name: What an error calls the model.
        adapted: Whether an adapter comes on it, by whose parameters alone is differentiated.

    Raises:
        ValueError: If it is quantised and not adapted, or no causal, masked or sequence-to-sequence language model.

    Example:
        >>> from types import SimpleNamespace
        >>> task_of(SimpleNamespace(architectures=["GPT2LMHeadModel"]))
        'causal_lm'
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None and not adapted:
        settings = quantisation if isinstance(quantisation, dict) else vars(quantisation)
        raise ValueError(
            f"{name} is quantised ({settings.get('quant_method')}), and such weights have no gradient; "
            "give the checkpoint that it was made from, or the folder of an adapter on it"
        )
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq_lm"
    architectures = getattr(config, "architectures", None) or []
    for suffix, task in _SUFFIXES:
        if architectures and architectures[0].endswith(suffix):
            masked = suffix == "LMHeadModel" and not getattr(config, "causal", True)  # XLM and Flaubert say it so
            return "masked_lm" if masked else task
    raise ValueError(
        f"{name} has architectures={architectures} in its config.json; expected a causal (…ForCausalLM, "
        "…LMHeadModel), masked (…ForMaskedLM) or sequence-to-sequence (is_encoder_decoder) language model; "
        "for any other model call fisherfunc.fisher_spectrum with its own batch and loss"
    )


def max_context(model: Any, tokenizer: Any) -> int | None:
    """The most positions that model and tokenizer take; None where nothing names a limit.

    Args:
        model: A Transformers model.
        tokenizer: Its tokenizer.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    limits += [getattr(tokenizer, "model_max_length", None), *_offset_tables(model)]
    sane = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _UNLIMITED]
    return min(sane, default=None)


def _offset_tables(model: Any) -> list[int]:
    """The usable rows of position tables that, like RoBERTa's, start counting after the padding id."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    return [
        table.num_embeddings - table.padding_idx - 1
        for table in tables
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None
    ]


def _without_broken_torchvision() -> None:
    """Hide a torchvision that cannot be imported (one built for another torch) before Transformers trips over it.

    Language models need none, and Transformers imports whatever torchvision it finds.
    """
    if "transformers" in sys.modules or find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError):  # what a mismatched build raises: "operator torchvision::nms does not exist"
        sys.modules["torchvision"] = None  # type: ignore[assignment]


def _transformers() -> ModuleType:
    _without_broken_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f'Hugging Face models need Transformers ({error}); install it with pip install "fisherfunc[hf]"'
        ) from error
    return transformers


def _located(model_id_or_folder: str | Path) -> str:
    """The folder, checked as far as no library is needed for that, or the hub id."""
    name = str(model_id_or_folder)
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        if isinstance(model_id_or_folder, Path) or not _HUB_ID.fullmatch(name):
            raise FileNotFoundError(
                f"there is no model folder {name!r}; give an existing folder or a hub id (owner/name)"
            )
        return name
    if not folder.is_dir():
        raise ValueError(f"{name} is a file; give the folder that holds config.json, weights and tokenizer")
    config = folder / "config.json"
    if not config.is_file() and (folder / ADAPTER_CONFIG).is_file():
        return str(folder)
    if not config.is_file():
        raise FileNotFoundError(f"{name} has no config.json; give a folder written by save_pretrained")
    _read_json(config)
    return str(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object; restore the file")
    return content


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used ({brief(error)}); try 'cpu'") from error


def _weights(auto_class: Any, place: str, name: str, dtype: torch.dtype) -> Any:
    with reading("weights", name):
        model, report = auto_class.from_pretrained(
            place,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them all
        )
    for problem in ("missing", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[f"{problem}_keys"])
        if names:
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", …" if len(names) > _NAMES_SHOWN else "")
            raise ValueError(
                f"{len(names)} tensor(s) of {type(model).__name__} are {problem} in the weights of {name}: "
                f"{shown}; they would be left at random; give a checkpoint saved with this configuration"
            )
    return model


def _has_tokenizer(folder: str) -> bool:
    return any((Path(folder) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def _tokenizer(transformers: ModuleType, place: str, name: str) -> Any:
    with reading("tokenizer", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(ordinary) < 2:  # without files, Transformers makes an empty tokenizer of the model's kind
        raise FileNotFoundError(
            f"{name} has no tokenizer (its vocabulary holds special tokens only); save one into the folder "
            "(tokenizer.save_pretrained writes tokenizer.json)"
        )
    return tokenizer
