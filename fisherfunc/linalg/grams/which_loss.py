"""Whether results are of one loss, by what their metadata say of it: its name, its shift, and what it computes."""

from collections.abc import Iterable, Mapping
from typing import Any

UNIDENTIFIED = "not identified"
"""What the identity begins with of a loss that cannot be told from others."""


def same_loss(results: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the losses are known to be one. Where an older version has not said what one computes, its name counts.

    Args:
        results: The metadata of each.
    """
    facts = list(results)
    names = {(f.get("loss"), f.get("shift", 0)) for f in facts}
    ids = {str(f["loss_id"]) for f in facts if f.get("loss_id") is not None}
    return len(names) == 1 and (len(ids) <= 1) and not any(one.startswith(UNIDENTIFIED) for one in ids)


def described_losses(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    """The losses in words, with what tells those of one name apart; None where one is not known.

    Args:
        results: {name: the metadata of each}.

    Example:
        >>> described_losses({"a": {"loss": "causal_lm", "shift": 1}, "b": {"loss": "masked_lm"}})
        {'a': 'causal_lm, shift 1', 'b': 'masked_lm, shift 0'}
        >>> described_losses({"a": {"loss": "mine", "loss_id": "12"}, "b": {"loss": "mine", "loss_id": "34"}})
        {'a': 'mine, shift 0, code 12', 'b': 'mine, shift 0, code 34'}
    """
    named = {
        name: None if f.get("loss") is None else f"{f['loss']}, shift {f.get('shift', 0)}"
        for name, f in results.items()
    }
    if len(set(named.values())) > 1:
        return named
    return {
        name: f"{text}, code {results[name]['loss_id']}" if text and results[name].get("loss_id") else text
        for name, text in named.items()
    }
