"""What gives batches one after the other, so that they need not all be in memory: and as many of them as are needed.

| given | gives |
| --- | --- |
| a DataLoader that does not shuffle | its batches |
| a Hugging Face `Dataset` or `IterableDataset` | each row as a batch of one sequence |
| any other iterable that begins anew each time | the batches that it gives |

The first ones are taken, up to the number of tokens that is asked for, so that the number of a sequence is what it is
where all are read.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Set
from contextlib import closing
from dataclasses import dataclass, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from fisherfunc.records.axes import Batch
from fisherfunc.runtime.draws import put_back

_LABELS = {"label": "labels", "label_ids": "labels"}
"""What Transformers' default collator renames, so that a data set fits the model."""
_NO_SOURCES = (Mapping, Set, tuple, list, str, bytes, Tensor, np.ndarray, nn.Module, Iterator, Dataset)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Batches that are made when they are asked for, the same ones each time.

    Attributes:
        name: What it is called.
        num_batches: How many it gives; None where nobody knows.
        batches: () → them, from the first on.
    """

    name: str
    num_batches: int | None
    batches: Callable[[], Iterator[Any]]


def source_of(given: Any) -> Source | None:
    """Return what a user gives for a batch as a source; None for what is a batch, a list of batches, or nothing known.

    Raises:
        ValueError: If it is a DataLoader with an order of its own.
        TypeError: If it can be read only once, though it looks as if it began anew.
    """
    name = type(given).__name__
    if isinstance(given, DataLoader):
        _check_order(given)
        return Source(name=name, num_batches=_length(given), batches=lambda: _loaded(given))
    if is_hugging_face(given):
        return Source(name=f"datasets.{name}", num_batches=_length(given), batches=lambda: map(_of_row, given))
    if isinstance(given, _NO_SOURCES) or not isinstance(given, Iterable) or is_dataclass(given):
        return None
    if hasattr(given, "keys"):  # some kind of mapping
        return None
    with put_back():
        once = iter(given) is iter(given)
    if once:
        raise TypeError(
            f"the {name} gives one iterator each time it is asked, which can be read only once; pass a list of what it "
            "gives, or an object whose __iter__ begins anew"
        )
    return Source(name=name, num_batches=_length(given), batches=lambda: iter(given))


def all_of(source: Source) -> list[Any]:
    """Return every batch of a source."""
    with put_back():
        return list(source.batches())


def first_of(given: Any, num_batches: int) -> Any:
    """Return the first batches of a source, as a list; what is none as it is."""
    source = source_of(given)
    if source is None:
        return given
    with put_back(), closing(_closable(source.batches())) as batches:
        return list(islice(batches, num_batches))


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Batches that were pulled.

    Attributes:
        batches: A list of them; what was given, where it is no source.
        facts: What was pulled of which source; None where it was none.
    """

    batches: Batch
    facts: dict[str, Any] | None


def gathered(
    given: Any, *, read: Callable[[Any], list[Batch]], num_tokens: int | None, count: Callable[[list[Batch]], int]
) -> Gathered:
    """Pull batches until they hold `num_tokens` tokens, or all of them.

    Args:
        given: A source, or a batch, which is left as it is.
        read: What a source gives → batches.
        num_tokens: How many are needed; all that there are where None.
        count: Batches → how many tokens they hold.
    """
    source = source_of(given)
    if source is None:
        return Gathered(batches=given, facts=None)
    found: list[Batch] = []
    pulled = held = 0
    ended = True
    with put_back(), closing(_closable(source.batches())) as batches:
        for entry in batches:
            new = read(entry)
            found += new
            pulled += 1
            if num_tokens is not None and (held := held + count(new)) >= num_tokens:
                ended = pulled == source.num_batches
                break
    if not found:
        raise ValueError(f"the batch is empty: the {source.name} gives nothing; give it a batch")
    facts = {"source": source.name, "num_batches": pulled, "of_batches": pulled if ended else source.num_batches}
    return Gathered(batches=found, facts=facts)


def told(facts: Mapping[str, Any] | None) -> list[str]:
    """Return the line that says that not all of the data were read; none where they were.

    Example:
        >>> told({"source": "DataLoader", "num_batches": 3, "of_batches": 40})
        ['data: the first 3 of 40 batches of a DataLoader, not spread over all of it']
        >>> told({"source": "datasets.IterableDataset", "num_batches": 3, "of_batches": None})
        ['data: the first 3 rows of a datasets.IterableDataset, which may go on']
    """
    if not facts or facts["num_batches"] == facts["of_batches"]:
        return []
    total, count = facts["of_batches"], facts["num_batches"]
    kind = "row" if facts["source"].startswith("datasets.") else "batch"
    plural = {"row": "rows", "batch": "batches"}[kind]
    if total is None:
        many = f"{count:,} {plural}" if count > 1 else kind
        return [f"data: the first {many} of a {facts['source']}, which may go on"]
    return [f"data: the first {count:,} of {total:,} {plural} of a {facts['source']}, not spread over all of it"]


def _closable(batches: Iterator[Any]) -> Generator[Any]:
    """The same as a generator, which can be closed before its end."""
    yield from batches


def _length(given: Any) -> int | None:
    try:
        return len(given)
    except (TypeError, NotImplementedError):  # also of a DataLoader whose data set has none
        return None


def _check_order(loader: DataLoader) -> None:
    parts: tuple[Any, ...] = (getattr(loader, "state", None), loader.batch_sampler, loader.dataset)
    for part in parts:
        library = {kind.__module__.partition(".")[0] for kind in type(part).__mro__}
        if library.isdisjoint({"accelerate", "transformers"}):  # a count of one's own says nothing of a division
            continue
        if getattr(part, "num_processes", 1) > 1 and getattr(part, "even_batches", True):
            raise ValueError(
                f"the {type(loader).__name__} is divided among {part.num_processes} processes, and repeats samples to "
                "make their shares even, so that tokens would count twice; pass the loader from before "
                "accelerator.prepare: ranks= deals its sequences to ranks"
            )
    in_order = isinstance(loader.sampler, SequentialSampler) and isinstance(loader.batch_sampler, BatchSampler | None)
    if not (in_order or isinstance(loader.dataset, IterableDataset)):
        raise ValueError(
            f"the DataLoader has an order of its own ({type(loader.sampler).__name__}), which may be another each "
            "time; pass list(loader), or a loader with shuffle=False"
        )


def _loaded(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader, whose own generator stays where it is."""
    state = None if loader.generator is None else loader.generator.get_state()
    try:
        yield from loader
    finally:
        if state is not None:
            loader.generator.set_state(state)


def is_hugging_face(given: Any) -> bool:
    """Whether it has what data sets of the library `datasets` have, which is no dependency."""
    return not isinstance(given, Mapping) and all(
        hasattr(given, name) for name in ("column_names", "features", "with_format", "__iter__")
    )


def _of_row(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A row of a data set as a batch of one sequence: numbers as tensors, with an axis of samples."""
    return {_LABELS.get(name, name): _tensor(name, value) for name, value in row.items() if value is not None}


def _tensor(name: str, value: Any) -> Tensor:
    reason = "no numbers"
    if isinstance(value, Tensor | np.ndarray | list | bool | int | float):
        try:
            return torch.as_tensor(value, device="cpu")[None]
        except (TypeError, ValueError) as error:  # of text, or of lists of several lengths
            reason = str(error)
    raise TypeError(
        f"the column {name!r} of the data set holds {type(value).__name__}, which makes no tensor ({reason}); once it "
        f"has been through a tokenizer or a transform, leave it out, as dataset.remove_columns([{name!r}]) does, or "
        "pass a DataLoader with a collate_fn"
    )
