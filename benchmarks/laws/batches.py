"""The batch of a recipe: what a user gives, and the same as pieces that the loop reads."""

from collections import UserDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.laws.model import FEATURES, VOCABULARY
from benchmarks.laws.recipe import LANGUAGE, Recipe


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One batch, as its rows are meant.

    Attributes:
        count: The number of samples.
        inputs: By the names of the arguments of `forward`.
        shared: Those of them that go whole to every sample.
        targets: (b, …); None where ids are their own.
        keep: (b, s), the positions that are no padding; None without a mask.
    """

    count: int
    inputs: Mapping[str, Any]
    shared: frozenset[str]
    targets: Tensor | None
    keep: Tensor | None

    def rows(self, rows: slice) -> dict[str, Any]:
        """The arguments of some of its samples."""
        return {name: value if name in self.shared else value[rows] for name, value in self.inputs.items()}


def pieces(recipe: Recipe) -> list[Piece]:
    """The batches of a recipe; they take their numbers from torch's generator."""
    make = _text if recipe.task in LANGUAGE else _vectors
    return [make(recipe, b, s) for b, s in zip(recipe.counts, recipe.lengths, strict=True)]


def _vectors(recipe: Recipe, b: int, s: int) -> Piece:
    shape = (b, FEATURES) if recipe.task in ("classification", "regression") else (b, s, FEATURES)
    inputs: dict[str, Any] = {"x": torch.randn(shape, dtype=torch.float64)}
    sizes = torch.randint(1, 6, (b,)).tolist()
    extras = {
        "lengths list": sizes,
        "lengths tuple": tuple(sizes),
        "lengths array": np.array(sizes),
        "lengths tensor": torch.tensor(sizes),
        "texts": [str(size) for size in sizes],
        "shared list": [0.5, 2.0, 0.25],
        "shared number": 0.75,
        "second input": torch.randn(shape, dtype=torch.float64),
    }
    if recipe.extra != "none":
        inputs["extra"] = extras[recipe.extra]
    return Piece(
        count=b,
        inputs=inputs,
        shared=frozenset({"extra"} if recipe.extra.startswith("shared") else {}),
        targets=_targets(recipe, b, s),
        keep=None,
    )


def _targets(recipe: Recipe, b: int, s: int) -> Tensor:
    if recipe.task == "regression":
        shape = (b,) if recipe.classes == 1 and recipe.seed % 2 else (b, recipe.classes)
        return torch.randn(shape, dtype=torch.float64)
    dtype = getattr(torch, recipe.target_dtype)
    classes = torch.randint(recipe.classes, (b, s) if recipe.task == "positions" else (b,))
    if recipe.task == "positions" and dtype != torch.uint8:
        classes[torch.rand(b, s) < 0.2] = -100
    return classes.to(dtype)


def _text(recipe: Recipe, b: int, s: int) -> Piece:
    ids = torch.randint(1, VOCABULARY, (b, s))
    keep = torch.ones(b, s, dtype=torch.bool)
    if recipe.padding != "none":
        sizes = torch.randint(2, s + 1, (b, 1))
        keep = torch.arange(s) < sizes
        keep = keep.flip(1) if recipe.padding == "left" else keep
    ids = torch.where(keep, ids, 0)
    inputs: dict[str, Any] = {"input_ids": ids}
    if recipe.mask != "none":
        inputs["attention_mask"] = _mask(recipe.mask, keep)
    targets = None
    if recipe.labels != "none":
        labels = torch.randint(VOCABULARY, (b, s)) if recipe.task == "masked_lm" else ids.clone()
        labels[torch.rand(b, s) < 0.3] = -100
        targets = labels.to(torch.int32 if recipe.seed % 3 == 0 else torch.int64)
    return Piece(
        count=b, inputs=inputs, shared=frozenset(), targets=targets, keep=None if recipe.mask == "none" else keep
    )


def _mask(kind: str, keep: Tensor) -> Tensor:
    if kind.startswith("added"):
        return torch.where(keep, 0.0, float(kind.removeprefix("added "))).double()
    return keep.to(torch.float64 if kind == "float 0/1" else getattr(torch, kind))


def given(recipe: Recipe, parts: list[Piece]) -> Any:
    """What a user hands over."""
    if "loader" in recipe.form:
        columns = [[*piece.inputs.values(), piece.targets] for piece in parts]
        rows = TensorDataset(*(torch.cat(column) for column in zip(*columns, strict=True)))
        loader = DataLoader(rows, batch_size=recipe.counts[0])
        return loader if recipe.form == "loader" else list(loader)
    made = [_formed(recipe, piece) for piece in parts]
    return made if len(made) > 1 else made[0]


def _formed(recipe: Recipe, piece: Piece) -> Any:
    named = dict(piece.inputs) if piece.targets is None else {**piece.inputs, "labels": piece.targets}
    if recipe.form in ("tuple", "list"):
        values = tuple(named.values())
        return list(values) if recipe.seed % 4 == 0 and recipe.form == "tuple" else values
    if recipe.form == "named tuple":
        return namedtuple("Given", named)(**named)
    if recipe.form == "dataclass":
        return make_dataclass("Given", named)(**named)
    return UserDict(named) if recipe.form == "user dict" else named
