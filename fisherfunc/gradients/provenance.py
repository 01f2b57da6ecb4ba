"""What Grams, projected rows and operators say of the rows that they are of."""

import torch

from fisherfunc.gradients.losses.identity import loss_id
from fisherfunc.gradients.rows.targets import Targets
from fisherfunc.gradients.rows.workload import Workload
from fisherfunc.gradients.survey.prepare import Prepared
from fisherfunc.linalg.grams.which_tokens import which_tokens
from fisherfunc.records.hashing import SHORT
from fisherfunc.records.plain import dtype_name
from fisherfunc.records.provenance import Provenance
from fisherfunc.runtime.versions import versions


def provenance_of_rows(ready: Prepared, rows: Workload, targets: Targets, *, unit: str, seed: int) -> Provenance:
    """Say which Fisher rows are of, by which loss, and which tokens they are.

    Args:
        ready: The tokens that were chosen.
        rows: What is passed over: of unit "sequence", pairs of a sequence and which of its tokens count.
        targets: The targets.
        unit: "token" or "sequence".
        seed: Of whatever was picked.
    """
    loss, params = ready.work.loss, rows.params
    summed = None
    if unit == "sequence":
        sequence, position = torch.cat([counted for _, counted in rows.sequences]).nonzero().unbind(dim=1)
        summed = which_tokens(sequence, position, num_units=len(sequence))
    return Provenance(
        fisher=targets.fisher,
        targets=targets.name,
        loss=loss.name,
        loss_id=loss_id(loss),
        shift=loss.shift,
        batch=ready.work.sequences.hash()[:SHORT],
        summed_tokens=summed,
        data=ready.data,
        num_valid_tokens=ready.num_valid,
        seed=int(seed),
        unit=unit,
        dtype="+".join(sorted({dtype_name(p.dtype) for p in params.values()})),
        device=str(next(iter(params.values())).device),
        each_alone=loss.each_alone,
        versions=versions(),
    )
