"""The folder of a result: whether it may be written, whose results it holds, and the files that go into it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherfunc.pipeline.result import FisherSpectrum
from fisherfunc.surface.files import CSV_NAME, JSON_NAME, check_writable, read_provenance, to_csv, to_json, write_files
from fisherfunc.surface.jobs.job import Job
from fisherfunc.surface.jobs.run_file import RUN_NAME, run_toml
from fisherfunc.surface.plots import plots
from fisherfunc.surface.plots.coupling_plot import plot_couplings

PLOT_NAME = "spectrum"
COUPLINGS_NAME = "couplings"


def check_output(folder: str | os.PathLike[str]) -> None:
    """Find out before the computation whether `save` can work.

    Raises:
        OSError: If the folder cannot be written.
        ImportError: If matplotlib is not installed.
    """
    check_writable(folder)
    plots.require_matplotlib()


def check_owner(folder: str | os.PathLike[str], job: Job) -> None:
    """Find out whether the folder that results go to by default holds those of another model.

    Raises:
        ValueError: If it does, or what it holds cannot be read; it names both models.
    """
    file = Path(folder) / JSON_NAME
    if not file.exists():
        return
    try:
        facts = read_provenance(file)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"whose results {folder} holds cannot be told ({error}); give another folder by --out"
        ) from error
    there = facts.model_source or facts.model_id
    here = job.owner if facts.model_source else job.name
    if there != here:
        raise ValueError(
            f"{folder} holds the results of another model, {there}, and this one is {here}; give a folder by --out"
        )


def save(result: FisherSpectrum, folder: str | os.PathLike[str], *, options: Mapping[str, Any]) -> list[Path]:
    """Write `spectrum.json`, `eigenvalues.csv`, `run.toml`, and as PNG and SVG `spectrum` and `couplings`, all or none.

    Couplings are drawn where there are two blocks or more; else those of an earlier result are deleted.

    Args:
        result: What to write.
        folder: Where.
        options: Of the command that made it, for `run.toml`.

    Raises:
        OSError: If a file cannot be written.
        ImportError: If matplotlib or tomli-w is not installed.
    """
    figures = {PLOT_NAME: plots.plot_spectrum(result)}
    if result.coupling is not None and len(result.blocks) > 1:
        figures[COUPLINGS_NAME] = plot_couplings(result)
    pictures = {f"{name}.{kind}": plots.rendered(fig, kind) for name, fig in figures.items() for kind in plots.FORMATS}
    values = to_csv(result)
    run = run_toml("spectrum", options, result.provenance, out=str(folder), eigenvalues=values)
    contents: dict[str, bytes | str] = {JSON_NAME: to_json(result), CSV_NAME: values, RUN_NAME: run, **pictures}
    return write_files(folder, contents, instead_of=[f"{COUPLINGS_NAME}.{kind}" for kind in plots.FORMATS])
