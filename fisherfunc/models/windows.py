"""From a text to batches of a language model: consecutive windows of `context` positions.

The text is tokenised whole, then cut. Nothing is padded; only the last window may be shorter, and windows of
one length are stacked. Axis order `(b, s)`. What a window of S positions holds, and what is predicted in it:

- causal_lm: S tokens, of which all but the first are predicted, S − 1: tokens of the text alone, or after the start
  tokens that the tokenizer puts before a text (`bos`), from which the first token of the text is predicted.
- masked_lm: tokens of the text between the special tokens of the tokenizer; 15 % of those of the text, at
  least one, chosen by a seed, are replaced by the mask token (all of them) and predicted.
- seq2seq_lm: S tokens of the text; the encoder reads the first half, the second half is predicted. Each half
  is wrapped as the tokenizer wraps any text (T5: an end token), so that is predicted as well.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.losses import IGNORED

BOS = ("auto", "always", "never")
MASKED_SHARE = 0.15
_PROBE_LENGTH = 200

Window = dict[str, list[int]]
Maker = Callable[[list[int]], Window | None]


def text_batches(
    tokenizer: Any,
    text: str,
    *,
    task: str,
    context: int,
    num_tokens: int | None = None,
    seed: int = 0,
    bos: str = "auto",
) -> list[dict[str, Tensor]]:
    """Cut a text into windows, from its beginning, until they hold `num_tokens` predictions or the text ends.

    Args:
        tokenizer: A Transformers tokenizer.
        text: The text.
        task: "causal_lm", "masked_lm" or "seq2seq_lm".
        context: S, the positions of a window; of both halves together for "seq2seq_lm".
        num_tokens: How many predictions are needed; all that the text gives where None.
        seed: Chooses the tokens that a masked model predicts.
        bos: What windows of a causal model begin with (see `start_tokens`): "auto", "always" or "never".

    Returns:
        One batch for the full windows and, where the text ends within a window, one for the last.

    Raises:
        ValueError: If the task is unknown, the context too small, the text too short for one prediction, or
            the tokenizer has no mask or start token where one is needed.
    """
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    start = start_tokens(tokenizer, text, task=task, bos=bos) if ids else []
    make: Maker
    prefix, suffix = _wrapping(tokenizer, text) if ids and task != "causal_lm" else ([], [])
    if task == "causal_lm":
        size, least, make = context - len(start), 1 if start else 2, _causal(start)
    elif task == "masked_lm":
        size, least = context - len(prefix) - len(suffix), 1
        make = _masked(tokenizer, prefix, suffix, seed)
    elif task == "seq2seq_lm":
        size, least, make = context, 2, _halves(prefix, suffix)
    else:
        raise ValueError(f"task expected 'causal_lm', 'masked_lm' or 'seq2seq_lm', got task={task!r}")
    if size < least:
        needed = context - size + least
        raise ValueError(f"context={context} leaves no token to predict; {task} needs {needed} or more")
    windows = _enough(ids, size, least, make, num_tokens)
    if not windows:
        raise ValueError(
            f"the text has {len(ids)} token(s), and {task} needs {least} for one prediction; give a longer text"
        )
    return _stacked(windows)


def start_tokens(tokenizer: Any, text: str, *, task: str, bos: str = "auto") -> list[int]:
    """Return the tokens that every window of a causal model begins with, before those of the text.

    Args:
        tokenizer: A Transformers tokenizer.
        text: The text.
        task: As of `text_batches`; only windows of causal models have a choice.
        bos: "auto": what the tokenizer puts before any text, LLaMA's a start token, GPT-2's nothing; "always": its
            start token; "never": nothing.

    Raises:
        ValueError: If `bos` is "always" and the tokenizer has no start token, or "auto" and it does not show what it
            puts before a text; or if `bos` is none of the three, or not "auto" for another task.
    """
    if bos not in BOS:
        raise ValueError(f"bos expected 'auto', 'always' or 'never', got bos={bos!r}")
    if task != "causal_lm":
        if bos != "auto":
            raise ValueError(
                f"bos={bos!r} is of causal models; windows of a {task} model are between the special tokens that its "
                "tokenizer puts around a text; leave it out"
            )
        return []
    if bos == "auto":
        return _wrapping(tokenizer, text)[0]
    if bos == "never":
        return []
    if tokenizer.bos_token_id is None:
        raise ValueError(
            "bos='always' needs a start token, and this tokenizer has none (its bos_token is None); take bos='auto', "
            "or set tokenizer.bos_token"
        )
    return [tokenizer.bos_token_id]


def num_valid_tokens(batches: Sequence[Mapping[str, Tensor]]) -> int:
    """How many predictions batches of `text_batches` hold.

    Example:
        >>> num_valid_tokens([{"input_ids": torch.zeros(2, 5)}])
        8
    """
    return sum(_num_predictions(batch) for batch in batches)


def _num_predictions(batch: Mapping[str, Tensor]) -> int:
    if "labels" in batch:
        return int((batch["labels"] != IGNORED).sum())
    sequences, positions = batch["input_ids"].shape
    return sequences * (positions - 1)


def _wrapping(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe = (text.strip() or text)[:_PROBE_LENGTH]
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    wrapped = tokenizer(probe)["input_ids"]
    for start in range(len(wrapped) - len(plain) + 1) if plain else ():
        if wrapped[start : start + len(plain)] == plain:
            return wrapped[:start], wrapped[start + len(plain) :]
    raise ValueError(
        "cannot tell which special tokens this tokenizer adds: its encoding with them does not contain that "
        "without; for a causal model take bos='always' or bos='never', else make the batches yourself and call "
        "fisherfunc.fisher_spectrum"
    )


def _enough(ids: list[int], size: int, least: int, make: Maker, num_tokens: int | None) -> list[Window]:
    windows: list[Window] = []
    found = 0
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        window = make(piece) if len(piece) >= least else None
        if window is not None:
            windows.append(window)
            found += _num_predictions({key: torch.tensor([row], device="cpu") for key, row in window.items()})
        if num_tokens is not None and found >= num_tokens:
            break
    return windows


def _causal(start: list[int]) -> Maker:
    def make(piece: list[int]) -> Window:
        inputs = start + piece
        window = {"input_ids": inputs, "attention_mask": [1] * len(inputs)}
        if len(start) > 1:  # the second start token is no prediction of the model, as the first is none
            window["labels"] = [IGNORED] * len(start) + piece
        return window

    return make


def _masked(tokenizer: Any, prefix: list[int], suffix: list[int], seed: int) -> Maker:
    mask = tokenizer.mask_token_id
    if mask is None:
        raise ValueError("a masked language model needs a mask token; set tokenizer.mask_token")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    generator = torch.Generator().manual_seed(seed)

    def make(piece: list[int]) -> Window | None:
        """None where all of the piece is special."""
        ordinary = [index for index, token in enumerate(piece) if token not in special]
        if not ordinary:
            return None
        order = torch.randperm(len(ordinary), generator=generator, device="cpu").tolist()
        chosen = {ordinary[index] for index in order[: max(1, round(MASKED_SHARE * len(ordinary)))]}
        inputs = [mask if index in chosen else token for index, token in enumerate(piece)]
        labels = [token if index in chosen else IGNORED for index, token in enumerate(piece)]
        inputs = prefix + inputs + suffix
        return {
            "input_ids": inputs,
            "attention_mask": [1] * len(inputs),
            "labels": [IGNORED] * len(prefix) + labels + [IGNORED] * len(suffix),
        }

    return make


def _halves(prefix: list[int], suffix: list[int]) -> Maker:
    def make(piece: list[int]) -> Window:
        middle = len(piece) // 2
        inputs = prefix + piece[:middle] + suffix
        return {
            "input_ids": inputs,
            "attention_mask": [1] * len(inputs),
            "labels": prefix + piece[middle:] + suffix,
        }

    return make


def _stacked(windows: list[Window]) -> list[dict[str, Tensor]]:
    groups: dict[tuple[int, ...], list[Window]] = {}
    for window in windows:
        groups.setdefault(tuple(map(len, window.values())), []).append(window)
    return [_tensors(group) for group in groups.values()]


def _tensors(group: list[Window]) -> dict[str, Tensor]:
    return {key: torch.tensor([window[key] for window in group], device="cpu") for key in group[0]}
