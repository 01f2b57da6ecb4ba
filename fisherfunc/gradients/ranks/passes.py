"""A pass over ranks, from rows to divided Grams, and what results say of the ranks."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fisherfunc.distributed.collectives import Everyone
from fisherfunc.gradients.checkpoint import folder_of, opened
from fisherfunc.gradients.checks.sound import SoundPass
from fisherfunc.gradients.ranks.ring import Ring
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.gradients.start import SAME
from fisherfunc.linalg.grams.divided import DividedGram
from fisherfunc.records.provenance import Provenance


def passed_over_ranks(
    everyone: Everyone,
    rows: Workload,
    options: PassOptions,
    passed: Callable[..., tuple[dict[str, Tensor], Provenance]],
    folder: Path | None,
    marks: Callable[[Workload], dict[str, str]],
) -> tuple[dict[str, Any], Provenance]:
    """Pass over rows with all ranks.

    Args:
        everyone: The ranks.
        rows: All of them; the same on every rank, which is checked.
        options: How.
        passed: (work, options, checkpoint=, company=) → the Grams of this rank's rows, and how they were computed.
        folder: Of the checkpoint; each rank has a folder in it.
        marks: Rows → what must be the same where a pass goes on.

    Returns:
        {label: a `DividedGram`}, and how they were computed: that of rank 0, whose share is the largest.

    Raises:
        ValueError: If ranks differ in what they must have in common.
    """
    everyone.check_alike({"checkpoint": folder is not None, **marks(rows)}, SAME)
    ring = Ring(everyone, rows)
    own = None if folder is None else folder_of(folder, rank=everyone.rank, size=everyone.size)
    kept = opened(own, lambda: marks(ring.work))
    grams, how = passed(ring.work, ring.options(options), checkpoint=kept, company=ring)
    how = everyone.from_first("how", lambda: replace(how, resumed=kept.resumed or None))
    return ring.divided(grams), replace(how, plan={**(how.plan or {}), "num_units": rows.num_tokens})


def facts_of_ranks(everyone: Everyone, done: SoundPass, took: Mapping[str, Any]) -> Provenance:
    """Return what results say of the ranks."""
    gram = next(iter(done.grams.values()))
    assert isinstance(gram, DividedGram)
    mine = done.rows.tokens.select(gram.index)
    own = {
        "sequences": len(mine.sequence.unique()),
        "tokens": len(mine.sequence) // mine.num_targets,
        "seconds": took["seconds"],
        "bytes_sent": everyone.bytes_sent,
        "peak_bytes": took["peak_bytes"],
    }
    return Provenance(num_ranks=everyone.size, ranks=everyone.gathered("what each took", own))
