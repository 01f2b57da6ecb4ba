"""The embedded language model: four checkpoints of one training run, and text it never saw.

A LLaMA-style decoder trained by `benchmarks/embedded_model` of the repository on public-domain speeches. Each
checkpoint is a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load without a
network; `model_card` says where the data came from and what each checkpoint scores.
"""

import json
from pathlib import Path
from typing import Any

__all__ = ["CHECKPOINTS", "checkpoint", "model_card", "sample_text"]

CHECKPOINTS = ("init", "early", "middle", "final")

_FOLDER = Path(__file__).parent


def checkpoint(name: str = "final") -> Path:
    """Folder of one checkpoint of the embedded language model.

    Args:
        name: One of `CHECKPOINTS`, which are in order of training.

    Returns:
        A folder that `from_pretrained` loads.

    Raises:
        ValueError: The run kept no checkpoint of that name.

    Example:
        >>> checkpoint("early").name
        'early'
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"no embedded checkpoint {name!r}; the run kept {CHECKPOINTS}; pass one")
    return _FOLDER / "sotu-llama" / name


def sample_text() -> Path:
    """Held-out English text (UTF-8) on which neither the model nor its tokenizer was trained."""
    return _FOLDER / "sample.txt"


def model_card() -> dict[str, Any]:
    """Provenance, recipe, and held-out losses (nats per token) of the embedded model.

    Example:
        >>> card = model_card()
        >>> losses = [card["checkpoints"][name]["held_out_loss"] for name in CHECKPOINTS]
        >>> losses == sorted(losses, reverse=True)
        True
    """
    return json.loads((_FOLDER / "card.json").read_text(encoding="utf-8"))
