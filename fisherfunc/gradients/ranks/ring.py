"""The ranks that a pass is done with: who has which rows, and how the factors of all of them meet.

Each rank holds the rows of every Gram that are its own, n × N. The factors of one parameter at a time go from rank r to
rank r + k, for k up to half the number of ranks R: rank r contracts its rows against those of r − k. So each pair of
ranks meets once, and what is above the diagonal comes from the rank that has computed it, once for every Gram, when all
is done. Where k is R/2 the two ranks of a pair would do the same: one takes the first half of the lower one's rows, the
other the second.

The order of sums is another for another number of ranks: Grams agree to round-off.
"""

import socket
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisherfunc.distributed.collectives import Everyone, RanksError
from fisherfunc.distributed.packing import Room
from fisherfunc.gradients.alone import Alone
from fisherfunc.gradients.capture.structure import Unsettled
from fisherfunc.gradients.checkpoint import Checkpoint
from fisherfunc.gradients.factored.plan import FactoredPlan
from fisherfunc.gradients.factored.route import NotFactorable
from fisherfunc.gradients.factors.contract import Holder, add_all
from fisherfunc.gradients.ranks.deal import dealt
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.linalg.factors.crossing import Parts, add_crossing, unpacked
from fisherfunc.linalg.gram import accumulate_rows
from fisherfunc.linalg.grams.divided import DividedGram, divided
from fisherfunc.runtime.threads import Workspace

T = TypeVar("T")


class _Disagreed(Exception):  # noqa: N818 (no error: each rank goes on with what was found)
    """A rank found what the structure did not have."""

    def __init__(self, verdict: tuple[str, Any]) -> None:
        super().__init__(verdict)
        self.verdict = verdict


class Ring(Alone):
    """What a pass over some rows asks of the ranks.

    Args:
        everyone: The ranks.
        work: All rows.
    """

    def __init__(self, everyone: Everyone, work: Workload) -> None:
        self.everyone = everyone
        self.deal = dealt(work, everyone.size)
        self.mine = self.deal.rows[everyone.rank]
        self.work = work.select(self.mine)
        self._device = next(iter(work.params.values())).device
        self._workspace, self._room = Workspace(), Room()
        self._contracting = False

    def options(self, options: PassOptions) -> PassOptions:
        """The options of this rank's pass: within memory that all have, and that leaves room for the rows of Grams.

        Raises:
            ValueError: If it does not.
        """
        limit = common_limit(self.everyone, options, self._device)
        most, count = max(self.deal.counts), sum(self.deal.counts)
        num_grams = len({*map(options.label, self.work.params)})
        beside = (num_grams + 1) * most * (count - most) * options.gram_dtype.itemsize  # a plan counts most × most
        if beside >= limit:
            raise ValueError(
                f"memory_limit={limit} bytes a rank is below the {beside} that {most} of {count} rows of {num_grams} "
                "Grams take beside the pass; raise it, take more ranks or coarser blocks, or lower num_tokens"
            )
        return replace(options, memory_limit=limit - beside)

    def run(self, passed: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The Grams of a pass, or what all agree is in its way."""
        try:
            return passed()
        except _Disagreed as found:
            _raise(found.verdict)
        except (Unsettled, RuntimeError) as error:
            if self._contracting or isinstance(error, torch.OutOfMemoryError):
                why = f"failed with {type(error).__name__}: {error}"
                self.everyone.fail(self.everyone.rank, why)
                raise RanksError(f"rank {self.everyone.rank} {why}", self.everyone.rank) from error
            verdict = ("unsettled", error.structure) if isinstance(error, Unsettled) else ("refused", _told(error))
            try:
                self._agree(verdict)
            except _Disagreed as found:
                _raise(found.verdict)
        raise AssertionError("a verdict is raised")

    def agreed(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, whose share is the largest."""

        def tried() -> tuple[Any, str | None]:
            try:
                return make(), None
            except NotFactorable as unfit:
                return None, str(unfit)

        value, unfit = self.everyone.from_first("the plan", tried)
        if unfit is not None:
            raise NotFactorable(unfit)
        if isinstance(value, FactoredPlan):  # points stay whole until those of all ranks have met
            value = replace(value, segments=replace(value.segments, carried={}))
        return value

    def any_of(self, found: bool) -> bool:
        """Whether one of them has found something."""
        return any(self.everyone.gathered("what was found", found))

    def columns(self, work: Workload) -> int:
        """How many columns a Gram has: those of all ranks."""
        return sum(self.deal.counts)

    def own(self, gram: Tensor) -> Tensor:
        """The columns of the rows here."""
        return gram[:, self.deal.columns(self.everyone.rank)]

    def finished(self, checkpoint: Checkpoint, number: int, like: Tensor) -> dict[str, Tensor] | None:
        """The Grams of a stage that an earlier run has finished, on every rank."""
        found = super().finished(checkpoint, number, like)
        return found if all(self.everyone.gathered("finished stages", found is not None)) else None

    def taken(self, number: int) -> None:
        """All pieces of a group were taken; on all ranks, or all of them stop."""
        self._agree(None)

    def add(
        self, holders: dict[str, Holder], grams: Mapping[str, Tensor], label: Callable[[str], str], new: set[str]
    ) -> None:
        """Add the rows of the Gram of each to those of its label; see `add_all`."""
        self._contracting = True
        for name in new:
            grams[name].zero_()
        parts = {name: holder.parts() for name, holder in holders.items()}
        squares = {label(name): self.own(grams[label(name)]) for name in parts}
        add_all(holders, squares, label, set())
        for name in list(parts):
            self._meet(name, parts.pop(name), grams[label(name)])
        self._room, self._contracting = Room(), False

    def add_rows(self, gram: Tensor, rows: Tensor) -> None:
        """K += G Gᵀ for the rows here and those of all. `gram` is written to."""
        self._contracting = True
        accumulate_rows(self.own(gram), rows)
        self._meet("formed rows", Parts(num_rows=len(rows), formed=rows, wide=True), gram)
        self._contracting = False

    def divided(self, grams: dict[str, Tensor]) -> dict[str, DividedGram]:
        """The Grams with the columns in the order of all rows; they are let go."""
        order = torch.cat(self.deal.rows).argsort()
        found = {}
        for label in list(grams):
            gram = grams.pop(label)
            self._mirror(label, gram)
            found[label] = divided(gram[:, order], self.mine, self.everyone)
        return found

    def _meet(self, name: str, parts: Parts, gram: Tensor) -> None:
        """Contract the rows here against those of other ranks."""
        rank, size = self.everyone.rank, self.everyone.size
        for step in range(1, size // 2 + 1):
            to, source = (rank + step) % size, (rank - step) % size
            columns = self.deal.columns(source)
            if 2 * step < size:
                theirs = self._swapped(name, parts, to, source)
                add_crossing(gram[:, columns], parts, theirs, self._workspace)
                continue
            half = self.deal.halves[min(rank, source)]
            if rank < source:
                theirs = self._swapped(name, parts.between(half, parts.num_rows), to, source)
                add_crossing(gram[:half, columns], parts.between(0, half), theirs, self._workspace)
            else:
                theirs = self._swapped(name, parts, to, source)
                add_crossing(gram[:, columns.start + half : columns.stop], parts, theirs, self._workspace)

    def _swapped(self, name: str, parts: Parts, to: int, source: int) -> Parts:
        tensors, about = parts.packed()
        sent = tensors or [torch.zeros(0, device=self._device)]
        room = self._room
        return unpacked(*self.everyone.exchanged(f"factors of {name}", sent, about, to=to, source=source, room=room))

    def _mirror(self, label: str, gram: Tensor) -> None:
        """Fill in what other ranks have computed: the transposes of their blocks. `gram` is written to."""
        rank, size = self.everyone.rank, self.everyone.size
        for step in range(1, size // 2 + 1):
            to, source = (rank + step) % size, (rank - step) % size
            here, there = self.deal.columns(source), self.deal.columns(to)
            if 2 * step < size:  # what was computed against `source` goes there, and that of `to` comes
                gram[:, there] = self._sent(label, gram[:, here], to=source, source=to).mT
                continue
            half = self.deal.halves[min(rank, source)]
            if rank < source:
                gram[half:, here] = self._sent(label, gram[:half, here], to=to, source=source).mT
            else:
                part = slice(here.start + half, here.stop)
                gram[:, here.start : part.start] = self._sent(label, gram[:, part], to=to, source=source).mT

    def _sent(self, label: str, block: Tensor, *, to: int, source: int) -> Tensor:
        return self.everyone.exchanged(f"rows of {label}", [block], None, to=to, source=source)[0][0]

    def _agree(self, verdict: tuple[str, Any] | None) -> None:
        found = [one for one in self.everyone.gathered("the pieces of a group", verdict) if one is not None]
        if found:
            raise _Disagreed(found[0])


def common_limit(everyone: Everyone, options: PassOptions, device: torch.device) -> int:
    """The memory that every rank has for itself, in bytes: what is free of a device is for all that run there."""
    where = (socket.gethostname(), str(device) if device.type == "cuda" else "")
    found = everyone.gathered("memory", (where, options.limit(device)))
    share = Counter(place for place, _ in found) if options.memory_limit is None else Counter[Any]()
    return min(limit // max(share[place], 1) for place, limit in found)


def _told(error: RuntimeError) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _raise(verdict: tuple[str, Any]) -> None:
    kind, found = verdict
    if kind == "unsettled":
        raise Unsettled(found)
    raise RuntimeError(found)
