"""Which tokens carry the leading eigenvectors, of a model and a text: `fisherfunc tokens`."""

from typing import Any

from fisherfunc.gradients import directions
from fisherfunc.partitioning import RULES
from fisherfunc.pipeline.eigenvectors import fisher_eigenpairs
from fisherfunc.records.axes import Progress
from fisherfunc.surface.job import DEFAULT_TOKENS, LOSSES, Job, loaded_model


def carriers(
    job: Job, *, block: str | None = None, num: int = 3, top: int = 10, progress: Progress | None = None
) -> tuple[list[directions.LeadingToken], dict[str, Any]]:
    """The tokens that carry the leading eigenvectors, and what is known of these. The unit is the token.

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
    loaded, batches, facts = loaded_model(job)
    loss = LOSSES[loaded.task]()
    pairs = fisher_eigenpairs(
        loaded.model,
        batches,
        num=num,
        block=block,
        blocks=RULES[job.blocks],
        loss=loss,
        center=job.center,
        num_tokens=job.num_tokens or DEFAULT_TOKENS,
        seed=job.seed,
        memory_limit=job.memory_limit,
        progress=progress,
    )
    rows = directions.leading_tokens(pairs, batches, loss, top=top, decode=loaded.tokenizer.decode)
    found = {"eigenvalues": pairs.eigenvalues.tolist(), "resolution": pairs.resolution.item()}
    return rows, {**pairs.metadata, **facts, **found, "block": pairs.label}
