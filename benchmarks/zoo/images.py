"""The image models of timm: of each of its files a small classifier, with what depth and width it lets one set."""

import copy
import re
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Case, NotTinyError, checked, perturbed

_NUM_CLASSES, _NUM_IMAGES = 5, 3
_SIZES = (64, 96, 224)
_MOST_PARAMETERS = 12_000_000
_SHRUNK: tuple[dict[str, Any], ...] = (  # the first that a model takes
    {"embed_dim": 32, "depth": 2, "num_heads": 2},
    {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32)},
    {"depths": (1, 1, 1, 1)},
    {"depth": 2},
    {"layers": (1, 1, 1, 1)},
    {"width": 0.25},
    {"width_mult": 0.25},
    {"num_features": 64},
    {},
)
_SMALL = ("test", "zepto", "atto", "femto", "pico", "nano", "xxxs", "xxs", "xxtiny", "xtiny", "tiny", "micro", "xs",
          "mini", "small", "lite")  # fmt: skip
_MOST_TRIED = 2


def names() -> list[str]:
    """The files of models that timm has; none where it is not installed."""
    return [] if find_spec("timm") is None else list(timm().list_modules())


def build(name: str, dtype: torch.dtype) -> Case:
    """The case of a file of timm.

    Raises:
        NotTinyError: If none of its models is small and runs on small images.
    """
    reasons = ["it has no model"]
    for model, options in product(sorted(timm().list_models(module=name), key=_by_size)[:_MOST_TRIED], _SHRUNK):
        for size in _SIZES:
            try:
                built = perturbed(checked(_created(model, size, options), _MOST_PARAMETERS)).to(dtype)
                images = torch.randn(_NUM_IMAGES, 3, size, size, dtype=dtype)
                with torch.no_grad():
                    copy.deepcopy(built)(images[:1])  # a copy: what it caches stays out of the case
            except NotTinyError as error:
                reasons.append(f"{model}: {error}")
                break
            except Exception as error:  # sizes that this model does not take: the next are tried, and the last told
                reasons.append(f"{model}: {type(error).__name__}: {' '.join(str(error).split())}")
            else:
                shown = ", ".join(f"{key}={value}" for key, value in options.items())
                classifier = _Classifier(built, f"{model}({shown}), {size} pixels").eval()
                return Case(classifier, {"images": images, "labels": torch.tensor([0, 2, 1])}, "classification")
    raise NotTinyError(reasons[-1])


class _Classifier(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.zoo_name = inner, name

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


def _created(name: str, size: int, options: dict[str, Any]) -> nn.Module:
    try:
        return timm().create_model(name, img_size=size, num_classes=_NUM_CLASSES, **options)
    except TypeError:  # a model of any size, which is told none
        return timm().create_model(name, num_classes=_NUM_CLASSES, **options)


def _by_size(name: str) -> tuple[int, list[int], str]:
    rank = next((place for place, word in enumerate(_SMALL) if word in name), len(_SMALL))
    return rank, [int(number) for number in re.findall(r"\d+", name)], name


def timm() -> ModuleType:
    """Import timm, over a stand-in for a torchvision that is missing or does not fit this torch: no model needs it."""
    if "timm" not in sys.modules and sys.modules.get("torchvision") is None:
        _stand_in()
    return import_module("timm")


class _Anything(type):
    """A class that has any attribute (the members of an enumeration): its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Standin(ModuleType):
    """A module all of whose names are empty classes."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


def _stand_in() -> None:
    inner = ("ops", "ops.misc", "transforms", "transforms.functional", "datasets", "utils", "models")
    for name in ("torchvision", *(f"torchvision.{part}" for part in (*inner, "models.feature_extraction"))):
        module = sys.modules[name] = _Standin(name)
        module.__spec__, module.__path__ = ModuleSpec(name, loader=None, is_package=True), []
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
