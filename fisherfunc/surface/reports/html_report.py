"""The report: one or more results as one page of HTML that needs no other file, no script and no network.

What stands on the page is collected here; `report.html` beside this file says where it stands.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fisherfunc.linalg import metrics
from fisherfunc.partitioning import RULES, by_head
from fisherfunc.pipeline.result import FisherSpectrum, limits_of
from fisherfunc.pipeline.sheets import result_sheet, told, which
from fisherfunc.pipeline.solve import NORMALIZATION
from fisherfunc.records.provenance import Provenance
from fisherfunc.records.sheet import Sheet, figure, log_plot, share_plot, table_html
from fisherfunc.surface.files import JSON_NAME, read_spectrum, write_files
from fisherfunc.surface.reports.population_notes import quantities
from fisherfunc.surface.reports.sample_notes import interval_notes
from fisherfunc.surface.visible import visible
from fisherfunc.surface.wording import count_of_units, model_name, notes

PAGE = "report.html"
TOKENS = "tokens.json"
"""What `fisherfunc tokens --json > FOLDER/tokens.json` writes, beside a result."""


def save_html(results: Mapping[str, FisherSpectrum], path: str | os.PathLike[str], *, tokens: Any = None) -> Path:
    """Write the page of some results, whole or not at all.

    Args:
        results: {name: result}.
        path: The file.
        tokens: {name: content of its `tokens.json`}, where there is one.

    Raises:
        ImportError: If Jinja2 is not installed.
        OSError: If the file cannot be written.
    """
    target = Path(path)
    return write_files(target.parent, {target.name: page(results, tokens=tokens)})[0]


def report_of(folders: Sequence[str], *, out: str | None = None) -> Path:
    """Write the report of folders of results: into the folder, of several here, or where `out` says.

    Args:
        folders: Of `fisherfunc spectrum`, or a `spectrum.json`.
        out: The file.

    Raises:
        FileNotFoundError: If there is no result.
        ValueError: If a file is damaged.
        OSError: If the page cannot be written.
        ImportError: If Jinja2 is not installed.
    """
    results = {str(folder): read_spectrum(folder) for folder in folders}
    places = {name: Path(name).parent if Path(name).name == JSON_NAME else Path(name) for name in results}
    beside = {name: place / TOKENS for name, place in places.items() if (place / TOKENS).exists()}
    tokens = {name: _tokens_of(file) for name, file in beside.items()}
    alone = next(iter(places.values())) / PAGE if len(results) == 1 else Path(PAGE)
    return save_html(results, out or alone, tokens=tokens)


def page(results: Mapping[str, FisherSpectrum], *, tokens: Mapping[str, Any] | None = None) -> str:
    """Return the page as text.

    Args:
        results: {name: result}.
        tokens: {name: content of its `tokens.json`}.

    Raises:
        ImportError: If Jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise ImportError(f'a report needs Jinja2 ({error}); install it: pip install "fisherfunc[report]"') from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(autoescape=True, loader=loader, undefined=jinja2.StrictUndefined).get_template(PAGE)
    parts = [_part(name, result, (tokens or {}).get(name), markupsafe.Markup) for name, result in results.items()]
    first = next(iter(results.values()))
    model = model_name(first.provenance)
    title = f"Spectrum of the {which(first.provenance)}" + (f" of {model}" if model and len(parts) == 1 else "")
    overview = markupsafe.Markup(table_html(_overview(results))) if len(parts) > 1 else ""
    return template.render(title=title, parts=parts, overview=overview)


def _overview(results: Mapping[str, FisherSpectrum]) -> Sheet:
    rows = []
    for name, result in results.items():
        values: dict[str, Any] = metrics.summary(result.full)
        shown = [figure(values[key]) for key in ("num_tokens", "largest", "trace", "effective_rank")]
        rows.append((name, which(result.provenance), figure(result.provenance.mean_loss), *shown))
    return Sheet(title="", columns=("result", "matrix", "loss", "N", "λ_max", "trace", "eff. rank"), rows=rows)


def _part(name: str, result: FisherSpectrum, tokens: Any, markup: Any) -> dict[str, Any]:
    facts, spectra = result.provenance, result.matrices
    sheet = result_sheet(spectra, facts, None)
    values = {label: spectrum.eigenvalues.tolist() for label, spectrum in spectra.items()}
    command = facts.command
    several = result.coupling is not None and len(result.blocks) > 1
    return {
        "name": visible(name),
        "unit": facts.unit or "token",
        "count": count_of_units(facts),
        "facts": [(key, visible(value)) for key, value in _facts(result)],
        "warnings": [visible(line) for line in _warnings(result)],
        "both": list(_both(result)),
        "population_note": _population_note(result),
        "table": markup(table_html(sheet)),
        "spectra": markup(log_plot(sheet.lines)),
        "cumulative": markup(share_plot(values)),
        "couplings": _couplings(result) if several else None,
        "couplings_note": "Alignment ‖F_ab‖²/(‖F_aa‖ ‖F_bb‖) of blocks a and b, of these tokens: 0 to 1",
        "tokens": [_shown(row) for row in tokens["tokens"]] if tokens else [],
        "tokens_of": visible(str(tokens["metadata"].get("block", "full matrix"))) if tokens else "",
        "tokens_command": _tokens_command(command),
        "command": command and visible(command),
        "python": _python(facts),
    }


def _facts(result: FisherSpectrum) -> Iterator[tuple[str, str]]:
    facts, full = result.provenance, result.full
    known = {"model": model_name(facts), "text": facts.text, "loss": facts.loss}
    yield from ((name, str(value)) for name, value in known.items() if value)
    if facts.mean_loss is not None:
        yield "mean loss", f"{facts.mean_loss:.4g} nats per token"
    yield "matrix", f"{which(facts)}, {facts.normalization or NORMALIZATION}"
    yield "N", f"{count_of_units(facts)}, of {facts.num_sequences or 'unknown'} sequences"
    frozen = facts.num_frozen_params
    count = full.num_params or 0
    share = f", {count / (count + frozen):.2%} of all; the others are frozen" if frozen else ""
    yield "P", f"{figure(full.num_params)} parameters" + (", all of the model" if frozen == 0 else share)
    yield "blocks", f"{len(result.blocks)}, {facts.blocks or 'by a rule'}"
    largest = float(full.eigenvalues[0])
    if largest > 0:
        yield "resolution", f"{float(full.resolution):.2e}, {float(full.resolution) / largest:.1e} of λ_max"
    checked = facts.self_check
    if checked:
        yield "check", f"off by {checked['difference']:.1e} of a block's trace, allowed {checked['tolerance']:.0e}"
    parts = {"dtype": facts.dtype, "device": facts.device, "seed": facts.seed, "route": facts.route}
    parts |= {"context": facts.context}
    yield from ((key, str(value)) for key, value in parts.items() if value is not None)
    if facts.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())


def _warnings(result: FisherSpectrum) -> list[str]:
    found = [*notes(result.provenance), *limits_of(result, result.full).warnings]
    if result.intervals is not None:
        found += interval_notes(result.intervals, ("largest", "trace", "effective_rank"))
    if int(metrics.numerical_rank(result.full)) < len(result.full.eigenvalues):
        found.append("some eigenvalues are below the resolution: the condition number is a lower bound")
    return found


def _both(result: FisherSpectrum) -> Iterator[tuple[str, str, str]]:
    """(quantity, of the sample, of the population), or why there is no interval."""
    if result.population is None:
        sample: dict[str, Any] = metrics.summary(result.full)
        for name, key in {"trace": "trace", "λ_max": "largest", "effective rank": "effective_rank"}.items():
            yield name, figure(sample[key]), told(None)
    for one in quantities(result):
        why = one.population.warning
        yield one.name, figure(one.sample), told(one.population) + ("" if why is None else f": {why}")


def _population_note(result: FisherSpectrum) -> str:
    if result.population is None:
        return str(result.provenance.population or "What holds of the population was not asked for.")
    level, count = result.population.leading_eigenvalue.level, result.population.num_clusters
    return f"{level:.0%} intervals over the {count} sequences, whose tokens depend on each other."


def _couplings(result: FisherSpectrum) -> dict[str, Any]:
    found = result.coupling
    assert found is not None
    labels = [visible(label) for label in found.labels]
    return {"labels": labels, "rows": list(zip(labels, found.alignment, strict=True))}


def _tokens_command(command: str | None) -> str:
    """The command that writes `tokens.json`: that of the spectrum, where `tokens` has all of its options."""
    words = (command or "").split()
    known = words and not {"--unit", "--targets", "--draws", "--intervals"} & set(words)
    return f"fisherfunc tokens {' '.join(words[2:]) if known else '…'}".rstrip() + f" --json > FOLDER/{TOKENS}"


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **{key: visible(str(row.get(key) or "")) for key in ("text", "before", "after")}}


def _tokens_of(file: Path) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {"metadata": dict(content["metadata"]), "tokens": [_checked(row) for row in content["tokens"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not what `fisherfunc tokens --json` writes ({error!r}); make it again") from error


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {"vector": int(row["vector"]), "share": float(row["share"]), "loss": float(row["loss"])}
    return {**row, **numbers}


def _python(facts: Provenance) -> str:
    """The call that gives the same numbers, for the model and the batch at hand."""
    given = [f"seed={facts.seed or 0}", f"num_tokens={facts.num_tokens}"]
    given += [f"unit={facts.unit!r}"] if facts.unit not in (None, "token") else []
    given += ["center=True"] if facts.centered else []
    rule = facts.blocks
    given += [f"blocks=ff.{rule}" if rule in {known.__name__ for known in RULES.values()} else "blocks=RULE"]
    targets = facts.targets or "observed"
    call = targets if targets.endswith(")") else f"{targets}()"
    given += [] if targets == "observed" else [f"targets=ff.targets.{call}"]
    lines = ["import fisherfunc as ff"]
    divided = ["model = ff.divide_heads(model)"] if rule == by_head.__name__ else []
    if facts.text and facts.model_id:
        lines += [
            "from fisherfunc.models.huggingface import load, text_batches",
            "loaded = load(MODEL)",
            f"batch = text_batches(loaded.tokenizer, TEXT, task=loaded.task, context={facts.context}, "
            f"num_tokens={facts.num_tokens}, seed={facts.seed or 0}, bos={facts.bos or 'auto'!r})",
            "model = loaded.model",
        ]
    return "\n".join([*lines, *divided, f"result = ff.fisher_spectrum(model, batch, {', '.join(given)})"])
