"""What a pass asks of the processes that it is done with; here there is one. Of ranks it is ranks/ring.py."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from fisherfunc.gradients.checkpoint import Checkpoint, finished_grams
from fisherfunc.gradients.factors.contract import Holder, add_all
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.linalg.gram import accumulate_rows

T = TypeVar("T")


class Alone:
    """One process, which has all rows."""

    def run(self, passed: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The Grams of a pass, or what all agree is in its way."""
        return passed()

    def agreed(self, make: Callable[[], T]) -> T:
        """What one of them makes."""
        return make()

    def any_of(self, found: bool) -> bool:
        """Whether one of them has found something."""
        return found

    def columns(self, work: Workload) -> int:
        """How many columns a Gram has here."""
        return work.num_tokens

    def own(self, gram: Tensor) -> Tensor:
        """The columns of the rows here."""
        return gram

    def finished(self, checkpoint: Checkpoint, number: int, like: Tensor) -> dict[str, Tensor] | None:
        """The Grams of a stage that an earlier run has finished."""
        return finished_grams(checkpoint, number, like)

    def taken(self, number: int) -> None:
        """All pieces of a group were taken."""

    def add(
        self, holders: dict[str, Holder], grams: Mapping[str, Tensor], label: Callable[[str], str], new: set[str]
    ) -> None:
        """Add the Gram of each to that of its label; see `add_all`."""
        add_all(holders, grams, label, new)

    def add_rows(self, gram: Tensor, rows: Tensor) -> None:
        """K += G Gᵀ. `gram` is written to."""
        accumulate_rows(gram, rows)


ALONE = Alone()
