"""From a text to batches of a language model: windows of `context` positions, spread evenly over the text.

The text is tokenised whole, then cut into consecutive windows, of which no more are taken than are needed: of n windows
k, those of number ⌊i n/k⌋, so that they are of all of the text and not of its beginning. Of several documents no window
holds more than one. Nothing is padded; only the last window of a document may be shorter, and windows of one length are
stacked. Axis order `(b, s)`. What a window of S positions holds, and what is predicted in it:

- causal_lm: S tokens, of which all but the first are predicted, S − 1: tokens of the text alone, or after the start
  tokens that the tokenizer puts before a text (`bos`), from which the first token of the text is predicted.
- masked_lm: tokens of the text between the special tokens of the tokenizer; 15 % of those of the text, at
  least one, chosen by a seed, are replaced by the mask token (all of them) and predicted.
- seq2seq_lm: S tokens of the text; the encoder reads the first half, the second half is predicted. Each half
  is wrapped as the tokenizer wraps any text (T5: an end token), so that is predicted as well.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisherfunc.gradients.losses import IGNORED

BOS = ("auto", "always", "never")
MASKED_SHARE = 0.15
_PROBE_LENGTH = 200

Window = dict[str, list[int]]
Piece = tuple[int, list[int]]
"""The number of a document, and consecutive tokens of it."""
Maker = Callable[[list[int]], Window | None]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of a text, as batches.

    Attributes:
        batches: Windows of one length together.
        documents: The number of the document of each window, in the order of the batches.
        num_windows: How many the text has; None where not all of it was read.
        start: The tokens that each of a causal model begins with, before those of the text.
    """

    batches: list[dict[str, Tensor]]
    documents: list[int]
    num_windows: int | None
    start: list[int]


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
    """Return the batches of `text_windows`, of one text.

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
        ValueError: As `text_windows`.
    """
    options: dict[str, Any] = {"task": task, "context": context, "num_tokens": num_tokens, "seed": seed, "bos": bos}
    return text_windows(tokenizer, [text], **options).batches


def text_windows(
    tokenizer: Any,
    documents: Sequence[str],
    *,
    task: str,
    context: int,
    num_tokens: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    spread: bool = True,
) -> Windows:
    """Cut documents into windows, and take as many as hold `num_tokens` predictions, or all where they hold fewer.

    Args:
        tokenizer: A Transformers tokenizer.
        documents: Their texts; one that is too short for a prediction gives no window.
        task: "causal_lm", "masked_lm" or "seq2seq_lm".
        context: S, the positions of a window; of both halves together for "seq2seq_lm".
        num_tokens: How many predictions are needed; all that the text gives where None.
        seed: Chooses the tokens that a masked model predicts.
        bos: What windows of a causal model begin with (see `start_tokens`): "auto", "always" or "never".
        spread: Whether windows are spread evenly over all of the text; else they are the first ones.

    Raises:
        ValueError: If the task is unknown, the context too small, the text too short for one prediction, or
            the tokenizer has no mask or start token where one is needed.
    """
    ids = [token_ids(tokenizer, text) for text in documents]
    text = next((text for text, found in zip(documents, ids, strict=True) if found), None)
    cut = cutting(tokenizer, text, task=task, context=context, seed=seed, bos=bos)
    size, least = cut.size, cut.least
    pieces = [
        (number, piece)
        for number, of in enumerate(ids)
        for begin in range(0, len(of), size)
        if len(piece := of[begin : begin + size]) >= least
    ]
    windows = _enough(pieces, cut.makers, num_tokens, spread)
    if not windows:
        raise ValueError(
            f"the text has {max(map(len, ids), default=0)} token(s), and {task} needs {least} for one prediction; give "
            "a longer text"
        )
    return stacked(windows, num_windows=len(pieces), start=cut.start)


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How tokens of a text become windows.

    Attributes:
        size: How many of them a window has.
        least: How many it has at the least.
        makers: () → what makes a window of such tokens; each begins anew to choose those that are masked.
        start: The tokens that each window of a causal model begins with.
    """

    size: int
    least: int
    makers: Callable[[], Maker]
    start: list[int]


def cutting(tokenizer: Any, text: str | None, *, task: str, context: int, seed: int, bos: str) -> Cutting:
    """Return how tokens become windows of a task.

    Args:
        tokenizer: A Transformers tokenizer.
        text: A text, which shows what the tokenizer puts around it; None where there is none.
        task: As of `text_windows`.
        context: As of `text_windows`.
        seed: As of `text_windows`.
        bos: As of `text_windows`.

    Raises:
        ValueError: As `text_windows`.
    """
    start = [] if text is None else start_tokens(tokenizer, text, task=task, bos=bos)
    makers: Callable[[], Maker]
    prefix, suffix = ([], []) if text is None or task == "causal_lm" else _wrapping(tokenizer, text)
    if task == "causal_lm":
        size, least, makers = context - len(start), 1 if start else 2, partial(_causal, start)
    elif task == "masked_lm":
        size, least = context - len(prefix) - len(suffix), 1
        makers = partial(_masked, tokenizer, prefix, suffix, seed)
    elif task == "seq2seq_lm":
        size, least, makers = context, 2, partial(_halves, prefix, suffix)
    else:
        raise ValueError(f"task expected 'causal_lm', 'masked_lm' or 'seq2seq_lm', got task={task!r}")
    if size < least:
        needed = context - size + least
        raise ValueError(f"context={context} leaves no token to predict; {task} needs {needed} or more")
    return Cutting(size=size, least=least, makers=makers, start=start)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, however long, without any around them."""
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def stacked(windows: list[tuple[int, Window]], *, num_windows: int | None, start: list[int]) -> Windows:
    """Return windows with those of one length together.

    Args:
        windows: Each with the number of its document.
        num_windows: How many the text has.
        start: What each begins with.
    """
    groups = _by_shape(windows)
    return Windows(
        batches=[_tensors([window for _, window in group]) for group in groups],
        documents=[number for group in groups for number, _ in group],
        num_windows=num_windows,
        start=start,
    )


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


def _enough(
    pieces: Sequence[Piece], makers: Callable[[], Maker], num_tokens: int | None, spread: bool
) -> list[tuple[int, Window]]:
    """As few windows as hold so many predictions; all where these hold fewer."""
    total = len(pieces)
    wanted = math.inf if num_tokens is None else num_tokens
    most = max(1, predictions_of(makers()(max(pieces, key=lambda piece: len(piece[1]))[1]))) if pieces else 1
    windows: list[tuple[int, Window]] = []
    count = found = 0
    while found < wanted and count < total:
        count = total if num_tokens is None else min(total, count + -(-(num_tokens - found) // most))
        make = makers()
        chosen = [pieces[i * total // count if spread else i] for i in range(count)]
        made = [(number, make(piece)) for number, piece in chosen]
        windows = [(number, window) for number, window in made if window is not None]
        found = sum(predictions_of(window) for _, window in windows)
    return windows


def predictions_of(window: Window | None) -> int:
    """How many predictions a window holds."""
    if window is None:
        return 0
    return _num_predictions({key: torch.tensor([row], device="cpu") for key, row in window.items()})


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


def _by_shape(windows: list[tuple[int, Window]]) -> list[list[tuple[int, Window]]]:
    groups: dict[tuple[int, ...], list[tuple[int, Window]]] = {}
    for entry in windows:
        groups.setdefault(tuple(map(len, entry[1].values())), []).append(entry)
    return list(groups.values())


def _tensors(group: list[Window]) -> dict[str, Tensor]:
    return {key: torch.tensor([window[key] for window in group], device="cpu") for key in group[0]}
