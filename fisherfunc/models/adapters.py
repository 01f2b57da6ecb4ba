"""Adapter folders of PEFT: which base they are of, and the base with the adapter on it, if both are here.

`PeftModel.save_pretrained` writes `adapter_config.json` and the weights of the adapter, not those of the base.
"""

import json
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

CONFIG = "adapter_config.json"
_WHOLE = ("model*.safetensors", "pytorch_model*.bin")
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", None)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder.

    Attributes:
        folder: The folder.
        base: The folder, or the hub id, of the model that it was made on.
    """

    folder: Path
    base: str


def adapter_in(place: str) -> Adapter | None:
    """Return the adapter in a folder; None where it holds none, or is no folder.

    Args:
        place: A folder or a hub id.

    Raises:
        ValueError: If the folder holds a whole model as well, or the adapter is of no language model.
        FileNotFoundError: If PEFT is not installed, or the base is neither a folder nor a downloaded model.
    """
    folder = Path(place)
    if not (folder / CONFIG).is_file():
        return None
    if any(path for pattern in _WHOLE for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder} holds a whole model and a PEFT adapter ({CONFIG}), and it cannot be told which is meant; move "
            "one of the two into a folder of its own"
        )
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        base, task = settings.get("base_model_name_or_path"), settings.get("task_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is not a JSON object ({error}); restore the file") from error
    what = f"{folder} is a PEFT adapter of {base or 'a model that it does not name'} ({CONFIG})"
    if task not in _TASKS:
        raise ValueError(
            f"{what} for task_type={task!r}, expected CAUSAL_LM or SEQ_2_SEQ_LM; for any other model call "
            "fisherfunc.fisher_spectrum with its own batch and loss"
        )
    lacking = _lacking(base)
    if lacking:
        raise FileNotFoundError(
            f"{what}, and {lacking}; merge it (merge_and_unload) and save, or pass the PeftModel to "
            "fisherfunc.fisher_spectrum"
        )
    return Adapter(folder=folder, base=base)


def with_adapter(model: Any, adapter: Adapter, *, dtype: torch.dtype) -> Any:
    """Return the base with the adapter on it: the adapter's parameters are trainable, those of the base are frozen.

    Args:
        model: The base.
        adapter: What to put on it.
        dtype: Of the adapter's weights.

    Raises:
        Exception: What PEFT raises where it cannot read the adapter; also where weights of it are missing.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be left at random
        adapted = PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=True, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def _lacking(base: str | None) -> str:
    """What an adapter cannot be loaded without, in words; empty where all is here."""
    if find_spec("peft") is None:
        return "PEFT is not installed, which puts it on its base (pip install peft)"
    if not base:
        return "its base is not known"
    if (Path(base).expanduser() / "config.json").is_file():
        return ""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "config.json")
    except HFValidationError:  # a folder on another machine
        found = None
    return (
        ""
        if isinstance(found, str)
        else f"its base is not here: there is no folder {base!r}, nor such a downloaded model"
    )
