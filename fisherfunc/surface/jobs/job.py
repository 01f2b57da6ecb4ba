"""The main job: a model and a text in, the spectrum and its files out. `spectrum` of the command line is this."""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch

from fisherfunc import assets
from fisherfunc.distributed.collectives import Everyone
from fisherfunc.gradients import losses
from fisherfunc.gradients.planning.run_plan import RunPlan
from fisherfunc.gradients.rows import targets
from fisherfunc.gradients.rows.targets import Targets
from fisherfunc.linalg.grams.sketches import kronecker
from fisherfunc.models.heads import divide_heads
from fisherfunc.models.huggingface import LoadedModel, load, num_valid_tokens, text_windows
from fisherfunc.models.sampled_windows import sampled_windows
from fisherfunc.models.windows import Windows
from fisherfunc.partitioning import RULES
from fisherfunc.pipeline.fisher import fisher_spectrum
from fisherfunc.pipeline.plan import plan
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.records.axes import Progress
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.files import read_spectrum
from fisherfunc.surface.jobs.large_texts import beginnings, excerpts_of, size_if_large
from fisherfunc.surface.jobs.texts import has_documents, is_stream, read_documents
from fisherfunc.surface.ranks import first_alone

DEFAULT_TOKENS = 512
DEFAULT_CONTEXT = 128
EMBEDDED_CONTEXT = 64
_OPTIONS = {"num_tokens": "tokens", "memory_limit": "memory", "num_draws": "draws"}
"""What the options of some fields are called."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to compute; None is the default that the command line's help states.

    Attributes:
        model: A folder or a hub id; the embedded model where None.
        checkpoint: Which checkpoint of the embedded model.
        text: A file of UTF-8 text or of JSON Lines, "-" for standard input; the embedded sample where None.
        blocks: A name in `fisherfunc.partitioning.RULES`.
        num_tokens: How many predictions.
        context: The positions of a window of text.
        memory_limit: In bytes.
        intervals: "bootstrap" or "jackknife" over the windows of text; no intervals where None.
        targets: "observed", "sampled" or "all-classes".
        num_draws: Of sampled targets; 1 where None.
        bos: What windows of causal models begin with (`start_tokens` in models/windows.py).
        sketch: The rank of random projections of the gradients; exact where None.

    Raises:
        ValueError: If targets that are not sampled have a number of draws.
    """

    model: str | None = None
    checkpoint: str = "final"
    text: str | None = None
    blocks: str = "layer"
    num_tokens: int | None = None
    context: int | None = None
    seed: int = 0
    center: bool = False
    unit: str = "token"
    dtype: str = "float32"
    device: str = "auto"
    memory_limit: int | None = None
    intervals: str | None = None
    targets: str = "observed"
    num_draws: int | None = None
    bos: str = "auto"
    sketch: int | None = None

    def __post_init__(self) -> None:
        if self.num_draws is not None and self.targets != "sampled":
            raise ValueError(
                f"--draws {self.num_draws} is of sampled targets, got --targets {self.targets}; leave it out"
            )

    @property
    def chosen_targets(self) -> Targets:
        """As `fisher_spectrum` takes them."""
        if self.targets == "sampled":
            return targets.sampled(self.num_draws or 1, seed=self.seed)
        return targets.all_classes() if self.targets == "all-classes" else targets.observed()

    @property
    def command(self) -> str:
        """The command line of this job: the options that are not their defaults."""
        words = ["fisherfunc", "spectrum"]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                option = "--" + _OPTIONS.get(entry.name, entry.name.replace("_", "-"))
                words += [option] if value is True else [option, str(value)]
        return shlex.join(words)

    @property
    def source(self) -> str:
        """The folder or hub id that is loaded."""
        return str(assets.checkpoint(self.checkpoint)) if self.model is None else self.model

    @property
    def name(self) -> str:
        """What results call the model; the embedded one has no machine-dependent path in it."""
        folder = Path(self.source)
        return f"{folder.parent.name}/{folder.name}" if self.model is None else self.source

    @property
    def owner(self) -> str:
        """Which model results are of, wherever the command is run: a folder's full path, or the hub id."""
        if self.model is None:
            return f"fisherfunc:{self.name}"
        folder = Path(self.model).expanduser()
        return _storable(str(folder.resolve())) if folder.exists() else self.model

    @property
    def folder(self) -> Path:
        """Where results go by default: a folder named after the model, here, but never the model's own."""
        parts = Path(self.name).parts if self.model is None else Path(self.name).resolve().parts[-1:]
        name = re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.") or "model"
        taken = Path(name).resolve() == Path(self.source).resolve()
        return Path(f"{name}-spectrum" if taken else name)


def compute(
    job: Job,
    *,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    everyone: Everyone | None = None,
) -> FisherSpectrum:
    """Load the model, cut the text into batches, and compute the spectrum.

    Args:
        job: What to compute.
        progress: Called as `progress(done, total)`.
        checkpoint: A folder to keep what is done in, and to go on from.
        everyone: The ranks that share the work.

    Raises:
        ValueError: If the text, the model or an option cannot be used; it says which and why.
        OSError: If a file cannot be read.
        ImportError: If Transformers is not installed.
    """
    if everyone is not None and everyone.size > 1 and is_stream(job.text):
        raise ValueError(f"--text {job.text} can be read once, and each of {everyone.size} ranks reads it; give a file")
    loaded, batches, clusters, facts = first_alone(everyone, "the model", lambda: loaded_model(job, everyone))
    result = fisher_spectrum(
        loaded.model,
        batches,
        **pass_options(job, loaded),
        targets=job.chosen_targets,
        center=job.center,
        unit=job.unit,
        checkpoint=checkpoint,
        intervals=job.intervals,
        clusters=clusters if job.sketch is None else None,
        sketch=None if job.sketch is None else kronecker(rank=job.sketch, seed=job.seed),
        ranks=cast(Any, everyone),
        progress=progress,
    )
    method = "exact" if job.sketch is None else "sketch"
    return replace(result, provenance=replace(result.provenance | facts, method=method))


def predict(
    job: Job, *, pilot: str | os.PathLike[str] | None = None, ranks: int | None = None
) -> tuple[RunPlan, Provenance]:
    """What `compute` would do and take, and what of the provenance is known before.

    Args:
        job: What would be computed.
        pilot: The folder of an earlier result of the model and the text, which says how many tokens numbers take.
        ranks: How many ranks to predict it for as well.

    Raises:
        ValueError: If the text, the model or an option cannot be used, or the pilot is of something else; it says which
            and why.
        OSError: If a file cannot be read.
        ImportError: If Transformers is not installed.
    """
    earlier = None if pilot is None else _pilot(job, pilot)
    loaded, batches, _, facts = loaded_model(job)
    found = plan(
        loaded.model,
        batches,
        **pass_options(job, loaded),
        targets=job.chosen_targets,
        unit=job.unit,
        pilot=earlier,
        ranks=ranks,
    )
    targets = job.chosen_targets
    return found, replace(facts, unit=job.unit, fisher=targets.fisher, targets=targets.name)


def _pilot(job: Job, folder: str | os.PathLike[str]) -> FisherSpectrum:
    """An earlier result of the same model, text, rows and Fisher: of another number of tokens, it may be."""
    found = read_spectrum(folder)
    known = found.provenance
    both = {
        "model source": (known.model_source, job.owner),
        "text": (known.text, _storable(job.text or "embedded sample")),
        "unit": (known.unit, job.unit),
        "fisher": (known.fisher, job.chosen_targets.fisher),
    }
    for fact, (there, value) in both.items():
        if there != value:
            raise ValueError(
                f"--pilot {folder} is of {fact} {there!r}, and this plan of {value!r}; run "
                "`fisherfunc spectrum` with the options of this plan and fewer --tokens, and give its folder"
            )
    return found


def pass_options(job: Job, loaded: LoadedModel) -> dict[str, Any]:
    """What every pass of a job has: its loss and blocks, which tokens, and the memory."""
    return {
        "loss": LOSSES[loaded.task](),
        "blocks": RULES[job.blocks],
        "num_tokens": job.num_tokens or DEFAULT_TOKENS,
        "seed": job.seed,
        "memory_limit": job.memory_limit,
    }


def loaded_model(
    job: Job, everyone: Everyone | None = None
) -> tuple[LoadedModel, list[dict[str, Any]], list[int] | None, Provenance]:
    """The model, the batches cut from the text, the documents of their windows where there are such, and what is said.

    Windows are spread evenly over the text; of a stream they are the first ones, as nobody knows how it goes on.
    """
    make = windows_of(job)
    loaded = load(job.source, dtype=getattr(torch, job.dtype), device=_device(job.device, everyone))
    if job.blocks == "head":
        loaded = replace(loaded, model=divide_heads(loaded.model))
    context = _context(job, loaded)
    windows = make(loaded, context)
    batches = windows.batches
    clusters = windows.documents if has_documents(job.text) else None
    _check_enough(job, num_valid_tokens(batches))
    _check_vocabulary(loaded, batches)
    uncounted = windows.num_windows is None and job.text is not None and not is_stream(job.text)
    start = loaded.tokenizer.convert_ids_to_tokens(windows.start) if loaded.task == "causal_lm" else None
    facts = Provenance(
        model_id=_storable(job.name),
        model_source=job.owner,
        adapter_of=None if loaded.adapter_of is None else _storable(loaded.adapter_of),
        text=_storable(job.text or "embedded sample"),
        command=_storable(job.command),
        context=context,
        bos=job.bos,
        window_start=start,
        num_windows=len(windows.documents),
        windows_of_text=windows.num_windows,
        bytes_of_text=Path(job.text).stat().st_size if uncounted and job.text else None,
        num_documents=None if clusters is None else len(set(clusters)),
    )
    return loaded, batches, clusters, facts


def windows_of(job: Job) -> Callable[[LoadedModel, int], Windows]:
    """Look at the text, and return what makes windows of it for a model and a context.

    A text of many megabytes is read where the windows lie, a stream as far as they go.

    Args:
        job: Which text, and how many tokens of it.

    Raises:
        ValueError: If it is no text.
        OSError: If it cannot be read.
    """
    wanted = job.num_tokens or DEFAULT_TOKENS
    large, stream = size_if_large(job.text, wanted) is not None, is_stream(job.text)
    documents = [] if large or stream else read_documents(job.text)
    excerpts = excerpts_of(job.text) if large and job.text is not None else None

    def make(loaded: LoadedModel, context: int) -> Windows:
        options: dict[str, Any] = {"task": loaded.task, "context": context, "num_tokens": wanted}
        options |= {"seed": job.seed, "bos": job.bos}
        sampled = None if excerpts is None else sampled_windows(loaded.tokenizer, excerpts, **options)
        if sampled is not None:
            return sampled
        if not stream or job.text is None:
            return text_windows(loaded.tokenizer, documents or read_documents(job.text), **options)
        for beginning, ends in beginnings(job.text):
            if ends or any(text.strip() for text in beginning):
                found = text_windows(loaded.tokenizer, beginning, **options, spread=False)
                cut_short = found.num_windows == len(found.documents)  # the last one might have gone on
                if ends or (num_valid_tokens(found.batches) >= wanted and not cut_short):
                    break
        return replace(found, num_windows=None)

    return make


def _storable(path: str) -> str:
    """The path as UTF-8 can hold it: bytes of a file name that are none are replaced."""
    return os.fsencode(path).decode(errors="replace")


LOSSES: dict[str, Callable[[], losses.TokenLoss]] = {
    "causal_lm": losses.causal_lm,
    "masked_lm": losses.masked_lm,
    "seq2seq_lm": losses.seq2seq_lm,
}


def _device(name: str, everyone: Everyone | None) -> str:
    if name in ("auto", "cuda") and everyone is not None and torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"  # that of this rank
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _context(job: Job, loaded: LoadedModel) -> int:
    limit = loaded.max_context
    if job.context is not None:
        if limit is not None and job.context > limit:
            raise ValueError(
                f"--context {job.context} is more than {loaded.name} takes; its maximum is {limit} positions"
            )
        return job.context
    default = EMBEDDED_CONTEXT if job.model is None else DEFAULT_CONTEXT
    return default if limit is None else min(default, limit)


def _check_enough(job: Job, found: int) -> None:
    if job.num_tokens is not None and found < job.num_tokens:
        raise ValueError(
            f"--tokens {job.num_tokens} asks for more predictions than the text gives, {found}; "
            f"give a longer text, or --tokens {found}"
        )


def _check_vocabulary(loaded: LoadedModel, batches: list[dict[str, Any]]) -> None:
    rows = loaded.model.get_input_embeddings().num_embeddings
    tensors = [batch[key] for batch in batches for key in ("input_ids", "labels") if key in batch]
    largest = max(int(tensor.max()) for tensor in tensors)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {loaded.name} gives token {largest}, and the model has {rows} embeddings; "
            "tokenizer and model do not belong together"
        )
