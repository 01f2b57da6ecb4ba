"""A Gram that does not fit the memory, from a model into a file: by pairs of parts of the rows, each a pass of its own.

The Gram of the rows of two parts I and J has K[I, J] in it. With b rows a part n rows take n²/2b² passes, and each
row is in n/b − 1 of them. What is held is the Gram of a pair, and the rows of I with all columns so far, which go to
the file. Axis order: rows n, m.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherfunc.gradients.autodiff.model_function import ModelFunction
from fisherfunc.gradients.by_route import passed_by_route
from fisherfunc.gradients.checkpoint import NOWHERE, Checkpoint, opened
from fisherfunc.gradients.checks.certificate import certified
from fisherfunc.gradients.checks.sound import SoundPass, named
from fisherfunc.gradients.fingerprint import fingerprint
from fisherfunc.gradients.losses.asked import AnyLoss
from fisherfunc.gradients.rows.gradient_rows import raise_nonfinite, runs
from fisherfunc.gradients.rows.subsample import EVERY
from fisherfunc.gradients.rows.targets import Targets
from fisherfunc.gradients.rows.workload import PassOptions, Workload
from fisherfunc.linalg.krylov.stored import StoredGram, stored_gram
from fisherfunc.operators.fisher import rows_of
from fisherfunc.partitioning import by_layer
from fisherfunc.records.axes import Batch, Params, Progress
from fisherfunc.runtime.memory import free_bytes
from fisherfunc.runtime.precision import full_precision

ALL = "all"
"""The label of the one Gram."""
SHARE = 4
"""The Gram of a pair with one in the making, and the rows that go to the file, take one part in so many of the memory
each: the rest is for factors."""
ENTRY = 8
"""Bytes of a number of a Gram."""
KEPT = "part-"
"""What the names of kept parts begin with."""


@full_precision()
@torch.inference_mode(mode=False)
def fisher_gram(
    path: str | os.PathLike[str],
    fn: ModelFunction,
    params: Params,
    batches: Batch,
    loss: AnyLoss,
    *,
    targets: Targets | None = None,
    block: str | None = None,
    blocks: Callable[[str], str] = by_layer,
    unit: str = "token",
    num_tokens: int | None = None,
    seed: int = 0,
    memory_limit: int | None = None,
    dtype: torch.dtype = torch.float32,
    part_rows: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> StoredGram:
    """Write the Gram of F to a file, in less memory than it takes: the matrix that `fisher` has the products of.

    It is that of `token_grams`, summed over parameters, and each pass is held against ordinary backward passes as it is
    there. Cost: with b rows a part n/b − 1 backward passes a row, and up to twice the contractions of one pass.

    Args:
        path: The file, of 2 N² bytes in float32; it is overwritten.
        fn: The model as a pure function.
        params: Where to differentiate, and by what.
        batches: A batch, a list of them, or what gives them one after the other.
        loss: The token loss: one of `ff.losses`, a loss of torch, or a function (output, batch) → losses.
        targets: Which Fisher, as of `fisher`.
        block: The label of a block of parameters; all of `params` where None.
        blocks: Parameter name → label.
        unit: What a row is: "token" or "sequence".
        num_tokens: At most this many tokens, picked by seed.
        seed: Of whatever is picked.
        memory_limit: In bytes, beyond the model; half of what is free where None.
        dtype: What the file has numbers in, float32 or float64.
        part_rows: b; where None, such that 64 b² bytes, for the Gram of a pair and one in the making, and 8 b n, for
            what goes to the file, take at most a quarter of the memory each. Of 8 GB, 40,000 rows have 5,590.
        checkpoint: A folder in which each part of the rows is kept as it is made, in float64, 4 N² bytes in all, until
            the file is written: the same call goes on from there.
        progress: Called with the pairs done and their number.

    Raises:
        ValueError: If no token is valid, there is no such block, an option is out of range, a loss or a gradient is not
            finite, the memory limit is too small for a pass, a pass differs from ordinary backward passes, or the
            folder is of another run; it says of which.
        OSError: If the file, or the folder, cannot be written.

    Example:
        >>> import tempfile, fisherfunc as ff
        >>> fn = ff.functionalize(torch.nn.Linear(1, 1, bias=False))
        >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:  # the rows of G are 3 and 12
        ...     params = {"weight": torch.tensor([[3.0]])}
        ...     gram = fisher_gram(f"{folder}/gram", fn, params, batch, ff.losses.regression())
        ...     gram.matmul(torch.eye(2, dtype=torch.float64))
        tensor([[  9.,  36.],
                [ 36., 144.]], dtype=torch.float64)
    """
    for name, value in (("memory_limit", memory_limit), ("part_rows", part_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} expected at least 1, got {name}={value}; None leaves it to what is free")
    which: dict[str, Any] = {"targets": targets, "block": block, "blocks": blocks, "unit": unit}
    chosen, _, work = rows_of(fn, params, batches, loss, **which, num_tokens=num_tokens, seed=seed)
    options = PassOptions(memory_limit=memory_limit, labels=dict.fromkeys(work.params, ALL))
    device = next(iter(work.params.values())).device
    limit, on_cpu = options.limit(device), device.type == "cpu"
    beside = limit if on_cpu else free_bytes(torch.device("cpu")) // 2
    most = min(int((limit / (SHARE * 8 * ENTRY)) ** 0.5), beside // (SHARE * ENTRY * work.num_tokens))
    kept = opened(checkpoint, lambda: fingerprint(work, options, f"by pairs, {part_rows}", EVERY, chosen.name))
    bounds = kept.plan or parts_of(work.tokens.sequence, part_rows or max(1, most))
    kept.begin(bounds)
    held = ENTRY * max(stop - start for start, stop in bounds) * work.num_tokens if on_cpu else 0
    within = replace(options, memory_limit=max(limit - held, 1))

    def gram(index: Tensor) -> Tensor:
        return _passed(work.select(index), within, unit, seed).to("cpu", torch.float64)

    written = stored_gram(
        path,
        Joined(made_by_pairs(bounds, gram, progress, kept=kept)).rows,
        num_rows=work.num_tokens,
        num_tokens=work.num_tokens // work.tokens.num_targets,
        num_params=sum(work.num_params.values()),
        dtype=dtype,
    )
    kept.drop(KEPT)
    return written


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """K[start:stop, :stop]."""

    start: int
    stop: int
    matrix: Float[Tensor, "m n"]


class Joined:
    """The rows of a Gram out of parts that are made one after the other, of which one is held.

    Args:
        made: From the first rows to the last.
    """

    def __init__(self, made: Iterator[Part]) -> None:
        self._made = made
        self._held: Part | None = None

    def rows(self, start: int, stop: int) -> Float[Tensor, "m n"]:
        """K[start:stop, :stop], asked for from the first rows to the last."""
        found, at = torch.zeros(stop - start, stop, dtype=torch.float64, device="cpu"), start
        while at < stop:
            if self._held is None or self._held.stop <= at:
                self._held = None  # before the next is made
                self._held = next(self._made)
            last = min(self._held.stop, stop)
            here = self._held.matrix[at - self._held.start : last - self._held.start, :last]
            found[at - start : last - start, :last] = here
            found[: at - start, at:last] = here[:, start:at].mT
            del here  # a view, which would keep this part beside the next
            at = last
        return found


def parts_of(sequence: Tensor, num_rows: int) -> list[tuple[int, int]]:
    """Divide rows into parts of whole sequences, of at most so many rows where a sequence has no more.

    Example:
        >>> parts_of(torch.tensor([0, 0, 1, 2, 2, 2, 3]), 3)
        [(0, 3), (3, 6), (6, 7)]
    """
    found: list[tuple[int, int]] = []
    for start, stop in runs(sequence):
        if found and stop - found[-1][0] <= num_rows:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def made_by_pairs(
    bounds: list[tuple[int, int]],
    gram: Callable[[Tensor], Tensor],
    progress: Progress | None = None,
    *,
    kept: Checkpoint = NOWHERE,
) -> Iterator[Part]:
    """Make the rows of a Gram from the Grams of pairs of parts; the first two parts are one.

    Args:
        bounds: Of the parts.
        gram: Some rows → their Gram, in float64 on the CPU.
        progress: Called with the pairs done and their number.
        kept: Where parts that are made are kept, and taken from.
    """
    total, done = max(1, len(bounds) * (len(bounds) - 1) // 2), 0
    first = bounds[min(1, len(bounds) - 1)][1]
    for number, (start, stop) in enumerate([(0, first), *bounds[2:]], start=1):
        others = bounds[:number] if start else [(0, 0)]
        if (known := kept.read(f"{KEPT}{number:05d}")) is not None:
            done += len(others)
            yield Part(start=start, stop=stop, matrix=known[0]["rows"])
            continue
        matrix = torch.empty(stop - start, stop, dtype=torch.float64, device="cpu")
        for begin, end in others:
            rows = [torch.arange(*ends, device="cpu") for ends in ((begin, end), (start, stop))]
            pair = gram(torch.cat(rows))
            matrix[:, begin:end] = pair[end - begin :, : end - begin]
            matrix[:, start:] = pair[end - begin :, end - begin :]
            del pair
            done += 1
            if progress is not None:
                progress(done, total)
        kept.write(f"{KEPT}{number:05d}", {"rows": matrix}, {})
        yield Part(start=start, stop=stop, matrix=matrix)
        del matrix


def _passed(work: Workload, options: PassOptions, unit: str, seed: int) -> Tensor:
    """The Gram of some rows, held against ordinary backward passes.

    Raises:
        ValueError: If a row is not finite, or the check fails on the dense route as well.
    """

    def done_by(route: str, why: str, refused: Mapping[str, str]) -> SoundPass:
        grams, how = passed_by_route(work, replace(options, refused=refused), route, note=why)
        raise_nonfinite(grams[ALL].diagonal().isfinite(), named(work, unit), ALL, of="block")
        return SoundPass(rows=work, grams=grams, how=how, num_tokens=work.num_tokens)

    limit = options.limit(next(iter(work.params.values())).device)
    done, _ = certified(done_by("factored", "", {}), done_by, labels=options.labels, limit=limit, seed=seed)
    return done.grams[ALL]
