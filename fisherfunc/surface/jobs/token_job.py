"""Which tokens carry the leading eigenvectors, of a model and a text: `fisherfunc tokens`."""

from typing import Any

from fisherfunc.gradients import directions
from fisherfunc.pipeline.eigenvectors import fisher_eigenpairs
from fisherfunc.records.axes import Progress
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.jobs.job import Job, loaded_model, pass_options


def carriers(
    job: Job, *, block: str | None = None, num: int = 3, top: int = 10, progress: Progress | None = None
) -> tuple[list[directions.LeadingToken], Provenance, dict[str, Any]]:
    """The tokens that carry the leading eigenvectors, how these came about, and what is known of them.

    The unit is the token.

    Args:
        job: What to compute.
        block: The label of a block; the full matrix where None.
        num: How many eigenvectors.
        top: How many tokens of each.
        progress: Called as `progress(done, total)`.

    Raises:
        ValueError: If the text, the model, the block or an option cannot be used; it says which and why.
        OSError: If a file cannot be read.
        ImportError: If Transformers is not installed.
    """
    loaded, batches, clusters, facts = loaded_model(job)
    options = pass_options(job, loaded)
    pairs = fisher_eigenpairs(
        loaded.model,
        batches,
        num=num,
        block=block,
        center=job.center,
        **options,
        clusters=clusters,
        progress=progress,
    )
    rows = directions.leading_tokens(pairs, batches, options["loss"], top=top, decode=loaded.tokenizer.decode)
    outside = None if pairs.out_of_sample is None else pairs.out_of_sample.tolist()
    found = {
        "eigenvalues": pairs.eigenvalues.tolist(),
        "out_of_sample": outside,
        "resolution": pairs.resolution.item(),
        "block": pairs.label,
    }
    return rows, pairs.provenance | facts, found
