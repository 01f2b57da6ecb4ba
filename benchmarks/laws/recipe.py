"""What a case is, in plain data, drawn from one integer: which parts, what batch, which options."""

import random
from dataclasses import dataclass, field
from typing import Any

from benchmarks.laws.parts import DRAWING, MEETING, PARTS, UNFOLLOWED

TASKS = ("classification", "pooled", "positions", "regression", "causal_lm", "masked_lm")
"""`pooled` classifies samples of several positions, `positions` each of them."""
LANGUAGE = ("causal_lm", "masked_lm")
MASKS = ("none", "bool", "uint8", "int64", "float 0/1", "added -1e9", "added -inf")
EXTRAS = ("none", "none", "none", "lengths list", "lengths tuple", "lengths array", "lengths tensor", "texts",
          "shared list", "shared number", "second input")  # fmt: skip
FORMS = ("tuple", "dict", "user dict", "named tuple", "dataclass", "list", "loader", "listed loader", "list of dicts")
EMBEDDINGS = ("plain", "plain", "padding", "largest norm", "tied")
CLASS_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64")
OUTPUTS = ("tensor", "tensor", "tuple", "dict", "object")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a case is made by.

    Attributes:
        seed: Of all numbers in it.
        parts: Names of parts, in order.
        task: One of `TASKS`.
        width: Of the activations.
        counts: The number of samples of each batch.
        lengths: The number of positions of each batch.
        classes: The number of classes, or of outputs.
        form: What the batch is.
        mask: What the attention mask is made of, for text.
        padding: Whether sequences have padding, which only a mask can say, on which side.
        labels: "none" (the targets are the ids), "given", or "used", by a model that takes them.
        extra: What there is in the batch beside the inputs.
        target_dtype: Of classes.
        embedding: The first layer, for text.
        output: What the model returns.
        training: Whether the module is in training mode.
        used: Whether it has been called before.
        options: Of `token_grams`.
    """

    seed: int
    parts: tuple[str, ...]
    task: str
    width: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    classes: int
    form: str
    mask: str
    padding: str
    labels: str
    extra: str
    target_dtype: str
    embedding: str
    output: str
    training: bool
    used: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers in evaluation mode."""
        return any(part in DRAWING for part in self.parts)


def drawn(seed: int) -> Recipe:
    """The recipe of a seed, the same in every process."""
    rng = random.Random(seed)
    task = rng.choice(TASKS)
    text = task in LANGUAGE
    mask = rng.choice(MASKS) if text else "none"
    form = _form(rng, task)
    several = form in ("list", "list of dicts") or (form in ("loader", "listed loader") and rng.random() < 0.7)
    batches = rng.randint(2, 3) if several else 1
    positions = task in ("pooled", "positions", *LANGUAGE)
    lengths = [rng.randint(2 if text else 1, 6) if positions else 1 for _ in range(batches)]
    if "loader" in form:  # of one data set
        lengths = lengths[:1] * batches
        count = rng.randint(1, 3)
        counts = [count] * (batches - 1) + [rng.randint(1, count)]
    else:
        counts = [rng.randint(1, 6 // batches) for _ in range(batches)]
    labels = "given" if task == "masked_lm" else rng.choice(("none", "given", "given")) if text else "given"
    if text and labels == "given" and "dict" in form and rng.random() < 0.2:
        labels = "used"
    return Recipe(
        seed=seed,
        parts=_parts(rng),
        task=task,
        width=rng.randint(4, 6),
        counts=tuple(counts),
        lengths=tuple(lengths),
        classes=rng.randint(1, 3) if task == "regression" else rng.choice((3, 4, 7)),
        form=form,
        mask=mask,
        padding="none" if mask == "none" else rng.choice(("none", "left", "right", "right")),
        labels=labels,
        extra="none" if text or "loader" in form else rng.choice(EXTRAS),
        target_dtype=rng.choice(CLASS_DTYPES),
        embedding=rng.choice(EMBEDDINGS),
        output=rng.choice(OUTPUTS),
        training=rng.random() < 0.5,
        used=rng.random() < 0.25,
        options=_options(rng),
    )


def _parts(rng: random.Random) -> tuple[str, ...]:
    rare = [*MEETING, *UNFOLLOWED]
    often = [name for name in PARTS if name not in rare]
    parts = [rng.choice(often) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.1:
        parts[rng.randrange(len(parts))] = rng.choice(rare)
    return tuple(parts)


def _form(rng: random.Random, task: str) -> str:
    if task not in LANGUAGE:
        return rng.choice(FORMS)
    return rng.choice(("dict", "dict", "user dict", "dataclass", "list of dicts"))


def _options(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"route": rng.choice(("factored", "factored", "dense"))}
    if rng.random() < 0.25:
        options["unit"] = "sequence"
    if rng.random() < 0.4:
        options["blocks"] = rng.choice(("by_layer", "whole"))
    if rng.random() < 0.3:
        options["chunk_size"] = rng.randint(1, 4)
    if rng.random() < 0.15:
        options["memory_limit"] = rng.choice((20_000, 1_000_000, 5_000_000, 20_000_000))
    if rng.random() < 0.2 and "unit" not in options:  # a row of a sequence does not say which of its tokens were picked
        options |= {"num_tokens": rng.randint(1, 8), "seed": rng.randrange(10)}
    return options
