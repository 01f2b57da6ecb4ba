"""Masks of attention: which positions they leave in, whatever they are made of.

| mask | attended to |
| --- | --- |
| booleans, integers; floats of 0 and 1 | where it is not 0 |
| floats of 0 and a large negative number, added to scores | where it is 0 |
| more than two axes | says who attends to whom, and nothing of which tokens count: labels of −100 do |

Which of the first two a float mask is can be told of a whole batch, and not of a row of zeros: `check_masks` looks at
all of it once, and refuses rows that `attended` would take for the other. Axis order: `(b, s)`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from fisherfunc.gradients.data.batches import TARGET_KEYS, by_name
from fisherfunc.records.axes import Batch

_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
LARGEST_ADDED = -1e3
"""A mask that is added to scores is at most this where nothing is attended to; a bias by distance is not."""


def attended(batch: Batch, key: str, ids: Tensor) -> Bool[Tensor, "b *s"]:
    """Which positions of `ids` the mask of a batch leaves in; all where there is none.

    Raises:
        ValueError: If it has another shape, and the batch has no labels that say which tokens count.
    """
    named = by_name(batch) or {}
    mask = named.get(key)
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device=ids.device)
    if mask.ndim > 2 and mask.ndim != ids.ndim:
        if any(named.get(name) is not None for name in TARGET_KEYS):
            return torch.ones_like(ids, dtype=torch.bool)
        raise ValueError(
            f"{key} has shape {tuple(mask.shape)}: a mask of {mask.ndim} axes says which positions attend to which, "
            "and not which tokens count; add labels to the batch, -100 where a token does not count"
        )
    if mask.shape != ids.shape:
        raise ValueError(f"{key} has shape {tuple(mask.shape)}, the targets {tuple(ids.shape)}; give them the same")
    if not mask.is_floating_point():
        return mask != 0
    return torch.where((mask > 0).any(dim=-1, keepdim=True), mask > 0, mask == 0)


def check_masks(batches: Sequence[Batch], key: str) -> None:
    """Raise where the masks of all batches together can be read in two ways, or in none.

    Args:
        batches: All of them.
        key: What the mask is called.

    Raises:
        ValueError: If it is neither of 0 and 1 nor of 0 and large negative numbers, or may be either.
    """
    held = [(by_name(batch) or {}).get(key) for batch in batches]
    masks = [mask for mask in held if isinstance(mask, Tensor) and mask.ndim == 2]
    if any(bool((mask < 0).any()) for mask in masks if mask.dtype in _SIGNED):
        raise ValueError(f"{key} holds negative integers; give booleans, or floats if it is added to scores")
    masks = [mask for mask in masks if mask.is_floating_point()]
    if not masks:
        return
    values = torch.cat([mask.flatten() for mask in masks])
    rows_with_a_one = torch.cat([(mask > 0).any(dim=-1) for mask in masks])
    added = bool((values < 0).any())
    fits = (values == 0) | (values <= LARGEST_ADDED) if added else (values == 0) | (values == 1)
    if not bool(fits.all()):
        raise ValueError(
            f"{key} holds {values[~fits][0].item():.6g}; expected 1 where a position is attended to and 0 elsewhere, "
            "or 0 and a large negative number (-1e9, -inf) that is added to scores; give booleans"
        )
    if not added and not bool(rows_with_a_one.all()):
        raise ValueError(
            f"{key} is of {masks[0].dtype} and has a row of zeros: nothing is attended to if it is a mask of 0 and 1, "
            "everything if it is added to scores; give booleans or integers"
        )
