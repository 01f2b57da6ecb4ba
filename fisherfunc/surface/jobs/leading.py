"""`fisherfunc spectrum --method lanczos`: the job, its files and its table.

`spectrum.json` has the keys of the exact method's, with the leading eigenvalues under `eigenvalues.full`, how far off
each can be under `full.bounds`, and sums over all eigenvalues under `estimates`; `per_block` is empty, as a block takes
a run of its own. `eigenvalues.csv` has the columns of the exact method's.
"""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from fisherfunc.pipeline.leading import LeadingSpectrum, leading_spectrum
from fisherfunc.records.axes import Progress
from fisherfunc.records.plain import dtype_name
from fisherfunc.surface.files import CSV_NAME, JSON_NAME, LEADING_FORMAT, write_files
from fisherfunc.surface.jobs.job import DEFAULT_TOKENS, LOSSES, Job, loaded_model
from fisherfunc.surface.jobs.run_file import RUN_NAME, run_toml
from fisherfunc.surface.plots import plots
from fisherfunc.surface.plots.plot_style import INK, require_matplotlib, styled, subtitle, titles
from fisherfunc.surface.reports.report import require_rich
from fisherfunc.surface.reports.tables import Column, Row, table
from fisherfunc.surface.visible import visible
from fisherfunc.surface.wording import count_of_units, matrix_name, model_name, number, windows


def compute(
    job: Job,
    *,
    num_leading: int,
    tolerance: float,
    num_probes: int,
    exact_trace: bool = False,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> LeadingSpectrum:
    """Load the model, cut the text into batches, and compute the leading eigenvalues.

    Args:
        job: What to compute.
        num_leading: How many eigenvalues.
        tolerance: Of their residuals, relative.
        num_probes: How many random vectors estimate the rest.
        exact_trace: Whether the trace is computed exactly.
        progress: Called as `progress(done, total)`, in products.
        checkpoint: A folder to keep what is done in, and to go on from.

    Raises:
        ValueError: If the text, the model or an option cannot be used; it says which and why.
        OSError: If a file cannot be read.
        ImportError: If Transformers is not installed.
    """
    refused = {"--center": job.center, "--intervals": job.intervals, f"--blocks {job.blocks}": job.blocks != "whole"}
    for option, given in refused.items():
        if given:
            raise ValueError(
                f"{option} is of --method exact: Lanczos is of the full matrix of the gradients as they are; leave it "
                "out, or take --method exact"
            )
    loaded, batches, _, facts = loaded_model(job)
    result = leading_spectrum(
        loaded.model,
        batches,
        loss=LOSSES[loaded.task](),
        targets=job.chosen_targets,
        unit=job.unit,
        num_tokens=job.num_tokens or DEFAULT_TOKENS,
        seed=job.seed,
        num_leading=num_leading,
        tolerance=tolerance,
        num_probes=num_probes,
        exact_trace=exact_trace,
        checkpoint=checkpoint,
        progress=progress,
    )
    return replace(result, provenance=result.provenance | facts)


def to_json(result: LeadingSpectrum) -> str:
    """Everything in a result as strict JSON.

    Raises:
        ValueError: If the metadata hold a NaN or an infinity.
        TypeError: If the metadata hold something that JSON has no form for.
    """
    values = result.full.eigenvalues
    content = {
        "format": LEADING_FORMAT,
        **result.to_dict(),
        "eigenvalues": {"per_block": {}, "full": values.tolist(), "dtype": dtype_name(values.dtype)},
    }
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def save(result: LeadingSpectrum, folder: str | os.PathLike[str], *, options: Mapping[str, Any]) -> list[Path]:
    """Write `spectrum.json`, `eigenvalues.csv`, `run.toml`, `spectrum.png` and `.svg`, all or none.

    Couplings of an earlier, exact result are deleted.

    Args:
        result: What to write.
        folder: Where.
        options: Of the command that made it, for `run.toml`.

    Raises:
        OSError: If a file cannot be written.
        ImportError: If matplotlib is not installed.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("block", "index", "eigenvalue"))
    writer.writerows(("full", index, repr(v)) for index, v in enumerate(result.full.eigenvalues.tolist()))
    figure = plot(result)
    pictures = {f"spectrum.{kind}": plots.rendered(figure, kind) for kind in plots.FORMATS}
    values = text.getvalue()
    run = run_toml("spectrum", options, result.provenance, out=str(folder), eigenvalues=values)
    contents: dict[str, bytes | str] = {JSON_NAME: to_json(result), CSV_NAME: values, RUN_NAME: run, **pictures}
    return write_files(folder, contents, instead_of=[f"couplings.{kind}" for kind in plots.FORMATS])


def plot(result: LeadingSpectrum) -> Any:
    """Draw the leading eigenvalues against their rank, with how far off each can be, as a matplotlib `Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    matplotlib = require_matplotlib()
    values, bounds = result.full.eigenvalues.tolist(), result.full.bounds.tolist()
    with styled(matplotlib):
        figure = matplotlib.figure.Figure(figsize=(7.6, 4.7), layout="constrained")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        scale = "log" if min(values) > 0 else "linear"
        axes = figure.add_subplot(xscale="log", yscale=scale, xlabel="rank $k$", ylabel=r"eigenvalue $\lambda_k$")
        below = [min(bound, 0.99 * value) if value > 0 else 0.0 for value, bound in zip(values, bounds, strict=True)]
        ranks = range(1, len(values) + 1)
        axes.errorbar(ranks, values, yerr=[below, bounds], color=INK, marker="o", markersize=3.5, linewidth=1.0)
        titles(axes, f"Leading eigenvalues of the {matrix_name(result.provenance)}", subtitle(result.provenance))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def report(result: LeadingSpectrum, *, width: int = 100) -> Any:
    """The eigenvalues with their bounds, and what else is known, as something that a rich console prints.

    Args:
        result: What to show.
        width: The columns of the terminal.

    Raises:
        ImportError: If rich is not installed.
    """
    rich = require_rich()
    columns = [Column("k"), Column("λ_k"), Column("within ±"), Column("relative", rank=1)]
    pairs = zip(result.full.eigenvalues.tolist(), result.full.bounds.tolist(), strict=True)
    rows = [
        Row([str(k), number(value), number(bound, digits=2), f"{bound / value:.1e}" if value > 0 else "–"])
        for k, (value, bound) in enumerate(pairs, start=1)
    ]
    name = matrix_name(result.provenance)
    model = model_name(result.provenance)
    title = f"Leading eigenvalues of the {name}" + (f" of {model}" if model else "")
    drawn, _ = table(rich, columns, rows, width=width)
    heading = rich.text.Text(visible(title[:1].upper() + title[1:]), style="table.title")
    return rich.console.Group(heading, drawn, "", *_notes(rich, result))


def _notes(rich: ModuleType, result: LeadingSpectrum) -> list[Any]:
    facts, full = result.provenance, result.full
    mean = facts.mean_loss
    lines = [
        f"Per {facts.unit}: {facts.normalization} ({count_of_units(facts)}; {full.num_params:,} parameters)",
        f"Loss: {facts.loss}, mean {mean:.3f} nats a token",
        *windows(facts),
        f"Certified: an eigenvalue lies within ± of each; the round-off of products, {full.round_off.item():.1e}, is "
        f"measured and included ({facts.derivative}, against {facts.round_off_measured_by})",
        f"Lanczos: {full.num_products} products; {facts.num_products} with those of the estimates",
    ]
    lines += [f"Not certified: {what}" for what in facts.not_certified or ()]
    if full.fallback:
        lines.append(f"Not within the tolerance: {full.fallback}")
    if result.rest is not None:
        lines.append("Estimated by random probes, ± error of quadrature ± standard error:")
        for label, estimate in (
            ("trace", result.rest.trace()),
            ("effective rank", result.rest.effective_rank()),
            ("participation ratio", result.rest.participation_ratio()),
        ):
            exact = label == "trace" and bool(facts.exact)
            spread = "exact" if exact else f"± {estimate.quadrature_error:.2g} ± {estimate.standard_error:.2g}"
            lines.append(f"  {label}: {number(estimate.value, scientific=False)} ({spread})")
    if facts.resumed_products:
        lines.append(f"resumed after {facts.resumed_products} products")
    return [rich.text.Text(visible(line), style="dim") for line in lines]
