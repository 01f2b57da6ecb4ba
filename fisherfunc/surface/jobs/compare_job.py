"""What `fisherfunc compare` does: arguments to results, a comparison, and its files."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherfunc.assets import CHECKPOINTS
from fisherfunc.pipeline.comparing.compare import compare
from fisherfunc.pipeline.comparing.comparison import Comparison
from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.records.axes import Progress
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.files import JSON_NAME, check_writable, read_spectrum, write_files
from fisherfunc.surface.jobs import job
from fisherfunc.surface.jobs.run_file import RUN_NAME, run_toml
from fisherfunc.surface.plots import plots
from fisherfunc.surface.plots.axis import varying_number
from fisherfunc.surface.plots.compare_plots import plot_comparison

NAME = "comparison"


def check(results: Sequence[str], folder: str | os.PathLike[str]) -> None:
    """Find out before any computation whether there are results to compare, and whether `save` can work.

    Raises:
        ValueError: If there are fewer than two results, or one is given twice.
        FileNotFoundError: If one is neither there nor a checkpoint.
        OSError: If the folder cannot be written.
        ImportError: If matplotlib is not installed.
    """
    if len(results) < 2:
        raise ValueError(f"compare needs two results or more, got {' '.join(results)}; name a second one")
    for given in results:
        if not Path(given).exists() and given not in CHECKPOINTS:
            raise FileNotFoundError(
                f"no result {given!r}: expected a folder of `fisherfunc spectrum`, its {JSON_NAME}, or a checkpoint of "
                f"the embedded model ({', '.join(CHECKPOINTS)})"
            )
    names_of(results)
    check_writable(folder)
    plots.require_matplotlib()


def compared(results: Sequence[str], *, across: Iterable[str] = (), progress: Progress | None = None) -> Comparison:
    """The comparison of results by their paths; embedded checkpoints are computed with the defaults of `spectrum`.

    Results whose names differ in one number are in its order, not in that of a shell (100, 1000, 50).

    Args:
        results: Folders, files, or names of checkpoints.
        across: As for `compare`.
        progress: Called as `progress(done, total)`.

    Raises:
        ValueError: If a file is damaged, or results are not to be compared; it says why.
        OSError: If a file cannot be read.
        ImportError: If Transformers is not installed, and a checkpoint is to be computed.
    """
    names = names_of(results)
    numbers = varying_number(names)
    order = sorted(range(len(names)), key=numbers.__getitem__) if numbers else range(len(names))
    found = {names[index]: _result(results[index], progress) for index in order}
    return compare(found, across=across)


def names_of(results: Sequence[str]) -> list[str]:
    """What results are called: by the last part of their path where these differ, else as they were given.

    Raises:
        ValueError: If one is given twice.

    Example:
        >>> names_of(["run/step-1", "run/step-2/spectrum.json"]), names_of(["a/x", "b/x"])
        (['step-1', 'step-2'], ['a/x', 'b/x'])
    """
    paths = [Path(given) for given in results]
    folders = [path.parent if path.name == JSON_NAME and path.parent.name else path for path in paths]
    if len(set(folders)) < len(folders):
        twice = next(str(folder) for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"{twice} is given twice; compare different results")
    short = [folder.stem if folder.suffix == ".json" else folder.name for folder in folders]
    return short if len(set(short)) == len(short) and all(short) else [str(folder) for folder in folders]


def save(
    found: Comparison, folder: str | os.PathLike[str], *, metrics: Sequence[str], options: Mapping[str, Any]
) -> list[Path]:
    """Write `comparison.json`, `run.toml`, `comparison.png` and `comparison.svg`, all or none.

    Args:
        found: What to write.
        folder: Where.
        metrics: Those that are drawn.
        options: Of the command that made it, for `run.toml`.

    Raises:
        OSError: If a file cannot be written.
        ImportError: If matplotlib is not installed.
    """
    figure = plot_comparison(found, metrics=metrics)
    text = json.dumps(found.to_dict(), allow_nan=False, ensure_ascii=False, indent=1) + "\n"
    pictures: dict[str, Any] = {f"{NAME}.{kind}": plots.rendered(figure, kind) for kind in plots.FORMATS}
    run = run_toml("compare", options, Provenance(), out=str(folder), eigenvalues=None)
    return write_files(folder, {f"{NAME}.json": text, **pictures, RUN_NAME: run})


def _result(given: str, progress: Progress | None) -> FisherSpectrum:
    if Path(given).exists() or given not in CHECKPOINTS:
        return read_spectrum(given)
    return job.compute(job.Job(checkpoint=given), progress=progress)
