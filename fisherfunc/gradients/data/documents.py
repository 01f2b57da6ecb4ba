"""Packed rows, divided into the documents that lie one after the other in them: no token of one reaches another.

| in the batch, beside `input_ids` | a document begins |
| --- | --- |
| `position_ids` | where they go back to the first of the row |
| `document_ids`, `document_id`, `doc_ids`, `seq_idx`, `sequence_ids` | where they change |
| `attention_mask` of integers above 1 | where it changes |
| `cu_seqlens`, `cu_seq_lens_q` and such | at each of these offsets |

A document is then a sequence of its own, alone in its batch: what tells documents apart has nothing left to tell.
Offsets and the lengths beside them (`max_length_q`) are left out, all else keeps the positions of the document. Axis
order: `(b, s, ...)`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherfunc.records.axes import Batch
from fisherfunc.records.containers import is_named_tuple

IDS = ("document_ids", "document_id", "doc_ids", "seq_idx", "sequence_ids")
_SIDES = ("", "_q", "_k")
OFFSETS = tuple(f"{name}{side}" for name in ("cu_seqlens", "cu_seq_lens") for side in _SIDES)
LENGTHS = tuple(f"{name}{side}" for name in ("max_seqlen", "max_length") for side in _SIDES)

Starts = list[list[int]]
"""Of each row, where its documents begin; the first begins at 0."""


def documents(batch: Batch) -> list[Batch]:
    """Return a batch of one row per document where rows are packed, and the batch as it is where none is.

    Raises:
        ValueError: If the entries of a packed batch disagree on its documents, or one of them cannot be divided.
    """
    named = batch._asdict() if is_named_tuple(batch) else batch
    if not isinstance(named, Mapping):
        return [batch]
    rows = next((named[key] for key in ("input_ids", "inputs_embeds") if _is_array(named.get(key))), None)
    if rows is None or 0 in rows.shape:
        return [batch]
    if rows.ndim < 2:
        _check_axis(named)
        return [batch]
    starts = _starts(named, rows.shape[0], rows.shape[1])
    offsets = [key for key in OFFSETS if named.get(key) is not None]
    if starts is None or (all(len(of_row) == 1 for of_row in starts) and not offsets):
        return [batch]
    if is_named_tuple(batch):
        raise ValueError(
            f"the named tuple {type(batch).__name__} has packed rows, {sum(map(len, starts))} documents in "
            f"{len(starts)} row(s); pass a dictionary of its fields, which is divided, or a batch for each document"
        )
    kept = {key: value for key, value in named.items() if key not in (*OFFSETS, *LENGTHS)}
    ends = [[*of_row[1:], rows.shape[1]] for of_row in starts]
    pieces = [(row, *piece) for row, of_row in enumerate(starts) for piece in zip(of_row, ends[row], strict=True)]
    return [{key: _cut(key, value, rows.shape[:2], *piece) for key, value in kept.items()} for piece in pieces]


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _check_axis(named: Mapping[str, Any]) -> None:
    """Raise where documents lie one after the other without an axis of rows."""
    found = [key for key in OFFSETS if named.get(key) is not None]
    if found:
        raise ValueError(
            f"the batch has {found[0]}, and input_ids without an axis of rows: documents one after the other; give "
            "each array of positions that axis, (1, positions), or pass a list with a batch for each document"
        )


def _starts(named: Mapping[str, Any], num_rows: int, length: int) -> Starts | None:
    """Where documents begin, by whatever says so; None where nothing does.

    Raises:
        ValueError: If two entries disagree.
    """
    mask = _of_positions(named.get("attention_mask"), num_rows, length)
    there = torch.ones(num_rows, length, dtype=torch.bool, device="cpu") if mask is None else _attended(mask)
    told: dict[str, Starts] = {}
    for key in IDS:
        ids = _of_positions(named.get(key), num_rows, length)
        if ids is not None:
            told[key] = [_changes(*row) for row in zip(ids, there, strict=True)]
    if mask is not None and not mask.is_floating_point() and int(mask.max()) > 1:
        told["attention_mask"] = [_changes(*row) for row in zip(mask, there, strict=True)]
    for key in OFFSETS:
        if named.get(key) is not None:
            told[key] = _of_offsets(key, named[key], num_rows, length)
    positions = _of_positions(named.get("position_ids"), num_rows, length)
    if positions is not None:
        restarts = [_restarts(number, *row) for number, row in enumerate(zip(positions, there, strict=True))]
        rises = [bool((row[on] != row[on][:1]).any()) for row, on in zip(positions, there, strict=True)]
        several = [len(of_row) > 1 for of_row in restarts]
        if any(s and r for s, r in zip(several, rises, strict=True)):  # else they count on, or are all alike: of no use
            told["position_ids"] = restarts
    for key, starts in told.items():
        first = next(iter(told))
        for row, (one, other) in enumerate(zip(told[first], starts, strict=True)):
            if one != other:
                raise ValueError(
                    f"row {row} of the batch is packed, and {first} has documents begin at {one}, {key} at {other}; "
                    "make them agree, leave one out, or pass a list with a batch for each document"
                )
    return next(iter(told.values()), None)


def _of_positions(value: Any, num_rows: int, length: int) -> Tensor | None:
    """An entry with a number for each position of each row, on the CPU; None for any other."""
    if not _is_array(value) or tuple(value.shape) not in ((num_rows, length), (1, length)):
        return None
    return torch.as_tensor(value, device="cpu").expand(num_rows, length)


def _attended(mask: Tensor) -> Tensor:
    added = mask.is_floating_point() and bool((mask < 0).any())  # to the scores: 0 where a position is attended to
    return mask == 0 if added else mask != 0


def _changes(ids: Tensor, there: Tensor) -> list[int]:
    places = there.nonzero().flatten()
    here = ids[places]
    return [0, *places[1:][here[1:] != here[:-1]].tolist()]


def _restarts(row: int, positions: Tensor, there: Tensor) -> list[int]:
    places = there.nonzero().flatten()
    here = positions[places]
    if len(here) == 0:
        return [0]
    back = here[1:] < here[:-1]
    if bool((back & (here[1:] != here[0])).any()):
        at = int((back & (here[1:] != here[0])).nonzero()[0, 0])
        raise ValueError(
            f"position_ids of row {row} go back from {int(here[at])} to {int(here[at + 1])} at position "
            f"{int(places[at + 1])}, and begin with {int(here[0])}: neither one document nor several, one after the "
            "other; pass a list with a batch for each document"
        )
    again = (here[1:] == here[:-1]) & (here[1:] == here[0])  # a document of one position
    return [0, *places[1:][back | again].tolist()]


def _of_offsets(key: str, offsets: Any, num_rows: int, length: int) -> Starts:
    values = torch.as_tensor(offsets, device="cpu").flatten().tolist()
    if num_rows != 1 or values[:1] != [0] or values[-1] != length or sorted(set(values)) != values:
        raise ValueError(
            f"{key} is {values[:6]}{' …' if len(values) > 6 else ''} for {num_rows} row(s) of {length} positions; "
            f"expected one row, and offsets that rise from 0 to {length}; pass a list with a batch for each document"
        )
    return [values[:-1]]


def _cut(key: str, value: Any, shape: Sequence[int], row: int, begin: int, end: int) -> Any:
    """What a document has of an entry of the batch."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    pairs = "mask" in key and _is_array(value) and tuple(value.shape[-2:]) == (shape[1], shape[1])
    if not _is_array(value) or (value.ndim and not pairs and tuple(value.shape[1:2]) != (shape[1],)):
        size = f"shape {tuple(value.shape)}" if _is_array(value) else type(value).__name__
        raise ValueError(
            f"the batch has packed rows, and {key} ({size}) has no entry for each of the {shape[1]} positions of "
            f"{shape[0]} row(s), so that it cannot be divided; pass a list with a batch for each document"
        )
    if value.ndim == 0:
        return value
    own = value[row : row + 1] if value.shape[0] == shape[0] else value
    if pairs:  # who attends to whom
        return own[..., begin:end, begin:end]
    own = own[:, begin:end]
    if key == "attention_mask" and isinstance(own, Tensor) and not own.is_floating_point():
        return (own != 0).to(own.dtype)  # the number of the document is none of a model's business
    return own
