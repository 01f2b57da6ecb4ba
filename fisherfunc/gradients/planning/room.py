"""Whether the Grams of a run fit the machine at all: known before any token is passed over."""

from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.runtime.memory import free_bytes


def check_room(work: Workload, options: PassOptions, num_ranks: int = 1) -> None:
    """Raise where the Grams alone take more than the memory that is free.

    Args:
        work: The rows.
        options: How they are passed over.
        num_ranks: How many share the Grams.

    Raises:
        MemoryError: If they do; it says what they take, and what takes less.
    """
    device = next(iter(work.params.values())).device
    count, num_grams = work.num_tokens, len({*map(options.label, work.params)})
    needed, free = num_grams * count**2 * options.gram_dtype.itemsize, free_bytes(device)
    needed, each = needed // num_ranks, " a rank" * (num_ranks > 1)
    if needed > free:
        raise MemoryError(
            f"{num_grams} Gram(s) of {count:,} rows take {needed / 1e9:,.1f} GB{each}, and {free / 1e9:,.1f} GB are "
            "free: the exact spectrum needs fewer tokens or coarser blocks; leading eigenvalues need no Gram: take "
            "--method lanczos of the command, or ff.kernels.lanczos()(ff.operators.fisher(fn, params, batch, loss)); "
            "ff.operators.fisher_gram writes the Gram to a file, for as many products as are wanted"
        )
