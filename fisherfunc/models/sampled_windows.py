"""Windows of a text that is too large to be tokenised whole: each from its place, and nothing else of it is read.

The k windows begin at i/k of the text's bytes, i = 0 … k − 1, each at the next beginning of a line or word, of
documents at that place within one. So they are spread evenly over all of it, as those of `text_windows` are, and only
where each begins is another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fisherfunc.models.windows import Window, Windows, cutting, predictions_of, stacked, token_ids

PROBES = 8
"""Places at which a text that shows what the tokenizer does is looked for."""
MARGIN = 8
"""Tokens read beyond the last of a window, where the text was cut: those before them are as if it went on."""


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """Some of a text.

    Attributes:
        document: Where its document begins, in bytes: each has another number.
        begin: Where it begins itself, within the text or the document.
        end: Where it ends there.
        text: What it says.
        ends: Whether the document, or the text, ends with it.
    """

    document: int
    begin: int
    end: int
    text: str
    ends: bool


Excerpts = Callable[[float, int, int], Excerpt]
"""(place from 0 to 1, about how long a window is, how much to read, both in characters) → what is there."""


def sampled_windows(
    tokenizer: Any,
    excerpts: Excerpts,
    *,
    task: str,
    context: int,
    num_tokens: int,
    seed: int = 0,
    bos: str = "auto",
) -> Windows | None:
    """Take windows from evenly spread places, as many as hold `num_tokens` predictions; None where there are too few.

    Args:
        tokenizer: A Transformers tokenizer.
        excerpts: Reads some of the text.
        task: "causal_lm", "masked_lm" or "seq2seq_lm".
        context: S, the positions of a window.
        num_tokens: How many predictions are needed.
        seed: Chooses the tokens that a masked model predicts.
        bos: What windows of a causal model begin with (see `start_tokens`).

    Raises:
        ValueError: As `text_windows`.
    """
    probes = (excerpts(i / PROBES, 1, 16 * context).text for i in range(PROBES))
    text = next((probe for probe in probes if probe.strip() and token_ids(tokenizer, probe)), None)
    if text is None:
        return None
    cut = cutting(tokenizer, text, task=task, context=context, seed=seed, bos=bos)
    ids = token_ids(tokenizer, text)
    span = -(-len(text) * cut.size // len(ids))
    most = max(1, predictions_of(cut.makers()((ids * cut.size)[: cut.size])))
    count = -(-num_tokens // most)
    while True:
        windows = _from_places(tokenizer, excerpts, count, span, cut.size, cut.least)
        make = cut.makers()
        made = [(document, window) for document, piece in windows if (window := make(piece)) is not None]
        found = sum(predictions_of(window) for _, window in made)
        if found >= num_tokens:
            return stacked(_numbered(made), num_windows=None, start=cut.start)
        if count >= num_tokens:  # as each holds one at the least, most of these places have none, or the same
            return None
        count = min(num_tokens, count + 1 + count * (num_tokens - found) // max(found, 1))


def _from_places(
    tokenizer: Any, excerpts: Excerpts, count: int, span: int, size: int, least: int
) -> list[tuple[int, list[int]]]:
    """The tokens at each place, with the document that they are of; no two of them overlap."""
    found: list[tuple[int, list[int]]] = []
    last: Excerpt | None = None
    for number in range(count):
        length = 2 * span
        while True:
            excerpt = excerpts(number / count, span, length)
            ids = token_ids(tokenizer, excerpt.text)
            if excerpt.ends or len(ids) >= size + MARGIN:
                break
            length *= 2
        begun = last is not None and last.document == excerpt.document and excerpt.begin < last.end
        if not begun and len(ids) >= least:
            found.append((excerpt.document, ids[:size]))
            last = excerpt
    return found


def _numbered(windows: list[tuple[int, Window]]) -> list[tuple[int, Window]]:
    """The documents by their numbers among those that there are."""
    order = {document: number for number, document in enumerate(dict.fromkeys(d for d, _ in windows))}
    return [(order[document], window) for document, window in windows]
