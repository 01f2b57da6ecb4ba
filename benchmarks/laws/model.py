"""The module of a recipe: an input layer, the parts, a head; float64, with noise in every parameter."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.laws.parts import PARTS
from benchmarks.laws.recipe import LANGUAGE, Recipe

VOCABULARY = 7
FEATURES = 3


class Body(nn.Module):
    """The parts and the head; subclasses read inputs."""

    def __init__(self, recipe: Recipe, first: nn.Module) -> None:
        super().__init__()
        d = recipe.width
        self.first = first
        self.parts = nn.ModuleList(PARTS[name](d) for name in recipe.parts)
        self.head = nn.Linear(d, VOCABULARY if recipe.task in LANGUAGE else recipe.classes)
        if recipe.embedding == "tied" and recipe.task in LANGUAGE:
            self.head.weight = first.weight
        self.pooled, self.output = recipe.task in ("classification", "pooled", "regression"), recipe.output

    def predictions(self, h: Tensor, keep: Tensor) -> Any:
        for part in self.parts:
            h = part(h, keep)
        logits = self.head(h.mean(1) if self.pooled else h)
        if self.output == "tuple":
            return logits, h
        if self.output == "dict":
            return {"hidden": h, "logits": logits}
        return SimpleNamespace(logits=logits, hidden=h) if self.output == "object" else logits


class Vectors(Body):
    """Inputs (b, f) or (b, s, f)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, nn.Linear(FEATURES, recipe.width))

    def forward(self, x: Tensor) -> Any:
        return self.hidden(self.first(x))

    def hidden(self, h: Tensor) -> Any:
        h = h[:, None] if h.ndim == 2 else h
        return self.predictions(h, torch.ones(h.shape[:2], dtype=torch.bool))


class VectorsAndMore(Vectors):
    """Something beside the inputs: a number a sample in whatever holds them, or something for all samples."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.kind = recipe.extra

    def forward(self, x: Tensor, extra: Any) -> Any:
        h = self.first(x)
        if self.kind == "second input":
            return self.hidden(h + self.first(extra).cos())
        if self.kind == "shared number":
            return self.hidden(h * extra)
        if self.kind == "shared list":
            return self.hidden(h * float(extra[0]) + float(sum(extra[1:])))
        sizes = torch.stack([torch.as_tensor(float(one)) for one in extra]).to(h)
        return self.hidden(h * sizes.reshape(-1, *[1] * (h.ndim - 1)).log1p())


class Text(Body):
    """Token ids (b, s), and a mask that the model reads in the one way that it is made for."""

    def __init__(self, recipe: Recipe) -> None:
        options = {"padding": {"padding_idx": 0}, "largest norm": {"max_norm": 1.0}}.get(recipe.embedding, {})
        super().__init__(recipe, nn.Embedding(VOCABULARY, recipe.width, **options))
        self.position, self.added = nn.Parameter(torch.randn(6, recipe.width)), recipe.mask.startswith("added")

    def kept(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return mask == 0 if self.added else mask != 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        h = self.first(input_ids) + self.position[: input_ids.shape[1]]
        return self.predictions(h, self.kept(input_ids, attention_mask))


class TextWithLabels(Text):
    """Predictions depend on the labels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        h = self.first(input_ids) + self.position[: input_ids.shape[1]]
        if labels is not None:
            h = h + 0.5 * self.first(labels.long().clamp(min=0)).sin()
        return self.predictions(h, self.kept(input_ids, attention_mask))


def module(recipe: Recipe) -> nn.Module:
    """The module of a recipe; it takes its numbers from torch's generator."""
    if recipe.task in LANGUAGE:
        model: nn.Module = TextWithLabels(recipe) if recipe.labels == "used" else Text(recipe)
    else:
        model = Vectors(recipe) if recipe.extra == "none" else VectorsAndMore(recipe)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for number, parameter in enumerate(model.parameters()):
        if number % 3 == 2 and recipe.seed % 2:
            parameter.grad = torch.ones_like(parameter)  # the user's own
    return model.train(recipe.training)
