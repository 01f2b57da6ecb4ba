"""The command line. Commands only read their options; the work is in job.py, the words in report.py."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from fisherfunc.surface.boundary import Group, Interrupted, guarded
from fisherfunc.surface.commands.check_command import check
from fisherfunc.surface.commands.compare_command import compare
from fisherfunc.surface.commands.format_options import FORMAT, as_options
from fisherfunc.surface.commands.help_texts import PLAN_HELP, SPECTRUM_HELP, TOKENS_HELP
from fisherfunc.surface.commands.report_command import report
from fisherfunc.surface.commands.run_command import options_of, run
from fisherfunc.surface.terminal import console as _console
from fisherfunc.surface.terminal import hush as _hush
from fisherfunc.surface.terminal import written
from fisherfunc.surface.visible import escaped_json


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fisherfunc", message="fisherfunc %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """The exact spectrum of the per-token Fisher information of neural networks, empirical or true."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _memory(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from fisherfunc.surface.commands.sizes import parse_bytes

    try:
        return parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_TEXT = click.Path(exists=True, dir_okay=False, allow_dash=True)
_COUNT = click.IntRange(min=1)
_CHECKPOINT = click.Choice(["init", "early", "middle", "final"])
_DTYPE = click.Choice(["float32", "float64", "bfloat16"])
_BOS = click.Choice(["auto", "always", "never"])


_BLOCKS = click.Choice(["layer", "module", "head", "parameter", "whole"])
_TASK = (
    click.option("--model", metavar="ID_OR_FOLDER", help="Hugging Face folder or hub id.  [default: embedded]"),
    click.option(
        "--text", type=_TEXT, metavar="FILE", help="UTF-8 text or JSON Lines; - is stdin.  [default: embedded]"
    ),
    click.option("--checkpoint", type=_CHECKPOINT, help="Of the embedded model.  [default: final]"),
    click.option("--blocks", type=_BLOCKS, default="layer", show_default=True, help="What a block of F is."),
    click.option(
        "--tokens",
        "num_tokens",
        type=_COUNT,
        metavar="N",
        help="How many predictions.  [default: 512, or what the text gives]",
    ),
    click.option(
        "--context",
        type=_COUNT,
        metavar="S",
        help="Positions of a window of text.  [default: 128, or the model's limit; 64 if embedded]",
    ),
    click.option("--seed", default=0, show_default=True, help="Picks and masks tokens, and draws targets."),
    click.option(
        "--bos",
        type=_BOS,
        default="auto",
        show_default=True,
        help="Start token of windows of causal models; auto: as the tokenizer begins any text.",
    ),
)
_TARGETS = click.Choice(["observed", "sampled", "all-classes"])
_CENTER = click.option("--center", is_flag=True, help="Subtract the mean gradient: the gradient covariance.")
_INTERVALS = click.option(
    "--intervals",
    type=click.Choice(["bootstrap", "jackknife"]),
    help="Confidence intervals of the trace of each block, over windows of text.",
)
_ROWS = (
    click.option(
        "--unit",
        type=click.Choice(["token", "sequence"]),
        default="token",
        show_default=True,
        help="Whose gradients; a sequence's is the sum of its tokens'.",
    ),
    click.option(
        "--targets",
        type=_TARGETS,
        default="observed",
        show_default=True,
        help="Of the losses: observed ones give the empirical Fisher, sampled ones an estimate of the true Fisher, "
        "all-classes the true Fisher exactly.",
    ),
    click.option("--draws", "num_draws", type=_COUNT, metavar="D", help="Of sampled targets, a token.  [default: 1]"),
)
_DIRECTIONS = (
    click.option("--block", metavar="LABEL", help="A block, by its label.  [default: the full matrix]"),
    click.option("--vectors", type=_COUNT, default=3, show_default=True, metavar="K", help="How many eigenvectors."),
    click.option("--top", type=_COUNT, default=10, show_default=True, metavar="N", help="How many tokens of each."),
)
_PILOT = click.option(
    "--pilot",
    type=click.Path(exists=True),
    metavar="DIR",
    help="Folder of an earlier, smaller `spectrum` of this model and text: says how many tokens its numbers take.",
)
_PASS = (
    click.option("--dtype", type=_DTYPE, default="float32", show_default=True, help="Of weights and gradients."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …; auto prefers cuda."),
    click.option(
        "--memory",
        "memory_limit",
        callback=_memory,
        metavar="SIZE",
        help="Limit of the pass: 2GB, 500MB, 1.5GiB.  [default: half of what is free]",
    ),
    *FORMAT,
)
_OUTPUT = (
    click.option("--quiet", is_flag=True, help="Print nothing but errors; the files are written."),
    click.option(
        "--out",
        type=click.Path(),
        metavar="DIR",
        help="Folder of the results; older ones are replaced.  [default: named after the model]",
    ),
    click.option(
        "--resume",
        type=click.Path(file_okay=False),
        metavar="DIR",
        help="Keep finished groups of parameters (or products) in this folder; the same command goes on from there.",
    ),
)
_METHOD = (
    click.option(
        "--method",
        type=click.Choice(["exact", "lanczos"]),
        default="exact",
        show_default=True,
        help="exact: every eigenvalue, from N × N matrices; lanczos: the leading ones of the full matrix, certified, "
        "without any: for tens of thousands of tokens.",
    ),
    click.option(
        "--sketch",
        type=_COUNT,
        metavar="RANK",
        help="Approximate, and marked so: gradients are projected to at most RANK² numbers a weight, twice, and every "
        "metric has the error of that beside it.",
    ),
    click.option("--leading", type=_COUNT, metavar="K", help="Of lanczos: how many eigenvalues.  [default: 20]"),
    click.option(
        "--tolerance",
        type=click.FloatRange(min=0, min_open=True),
        metavar="T",
        help="Of lanczos: residuals relative to their eigenvalues.  [default: 0.01]",
    ),
    click.option(
        "--probes",
        type=click.IntRange(min=0),
        metavar="R",
        help="Of lanczos: random vectors that estimate trace, effective rank and more; 0 for none.  [default: 4]",
    ),
    click.option(
        "--trace",
        "trace",
        type=click.Choice(["estimated", "exact"]),
        help="Of lanczos: by probes, or exactly, at a backward pass a token more.  [default: estimated]",
    ),
)
_RANKS = click.option(
    "--ranks", type=_COUNT, metavar="R", help="Predict the run under torchrun as well, on R processes such as this."
)
_DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


@cli.command(help=SPECTRUM_HELP, short_help="The spectrum of a language model's empirical Fisher.")
@as_options(*_TASK, *_METHOD, _CENTER, _INTERVALS, *_ROWS, *_PASS, *_OUTPUT, _DEBUG)
@guarded
def spectrum(
    form: str, quiet: bool, out: str | None, checkpoint: str | None, resume: str | None, method: str, **options: Any
) -> None:
    """Run the main job."""
    _check_checkpoint(checkpoint, options)
    of_lanczos = _of_lanczos(method, options)
    from fisherfunc.surface.ranks import all_ranks

    with all_ranks() as everyone:
        if everyone is not None and everyone.size > 1 and of_lanczos is not None:
            raise ValueError(
                "--method lanczos runs in one process; over ranks, ff.operators.over_ranks has its products"
            )
        _spectrum(form, quiet, out, checkpoint, resume, of_lanczos, options, everyone)


@cli.command(help=PLAN_HELP, short_help="What `spectrum` would do, and the time and memory it would take.")
@as_options(*_TASK, *_ROWS, _PILOT, *_PASS, _RANKS, _DEBUG)
@guarded
def plan(form: str, checkpoint: str | None, pilot: str | None, ranks: int | None, **options: Any) -> None:
    """Predict the main job."""
    _check_checkpoint(checkpoint, options)
    from fisherfunc.surface.jobs import job

    _hush()
    found, facts = job.predict(job.Job(checkpoint=checkpoint or "final", **options), pilot=pilot, ranks=ranks)
    if form == "json":
        click.echo(json.dumps({"metadata": facts.to_dict(), **found.to_dict()}, allow_nan=False, indent=1))
        return
    from fisherfunc.surface.reports.plan_report import plan_report

    console = _console()
    console.print(plan_report(found, facts, width=console.width))


@cli.command(help=TOKENS_HELP, short_help="Which tokens carry the leading eigenvectors.")
@as_options(*_TASK, *_DIRECTIONS, _CENTER, *_PASS, _DEBUG)
@guarded
def tokens(form: str, checkpoint: str | None, block: str | None, vectors: int, top: int, **options: Any) -> None:
    """Print tokens."""
    _check_checkpoint(checkpoint, options)
    from fisherfunc.surface.jobs import job, token_job
    from fisherfunc.surface.progress import progress_bar

    _hush()
    task = job.Job(checkpoint=checkpoint or "final", **options)
    with progress_bar() as progress:
        rows, facts, found = token_job.carriers(task, block=block, num=vectors, top=top, progress=progress)
    if form == "json":
        told = {"metadata": {**facts.to_dict(), **found}, "tokens": [asdict(row) for row in rows]}
        click.echo(escaped_json(json.dumps(told, allow_nan=False, indent=1, ensure_ascii=False)))
        return
    from fisherfunc.surface.reports.token_report import token_report

    console = _console()
    console.print(token_report(rows, facts, found, width=console.width))


def _spectrum(
    form: str,
    quiet: bool,
    out: str | None,
    checkpoint: str | None,
    resume: str | None,
    of_lanczos: dict[str, Any] | None,
    options: dict[str, Any],
    everyone: Any,
) -> None:
    """Run the main job, as one rank of all where there are several; rank 0 alone prints and writes."""
    from fisherfunc.surface.jobs import job, leading, results
    from fisherfunc.surface.progress import progress_bar

    _hush()
    task = job.Job(checkpoint=checkpoint or "final", **options)
    folder = out or task.folder
    speaks = everyone is None or everyone.rank == 0
    quiet = quiet or not speaks
    if speaks:
        results.check_output(folder)
        if out is None:
            results.check_owner(task.folder, task)
    try:
        with progress_bar(quiet=quiet, doing="gradients" if of_lanczos is None else "products") as progress:
            result: Any
            if of_lanczos is None:
                result = job.compute(task, progress=progress, checkpoint=resume, everyone=everyone)
            else:
                result = leading.compute(task, **of_lanczos, progress=progress, checkpoint=resume)
    except KeyboardInterrupt as error:
        if resume is None:
            raise
        raise Interrupted(_how_to_go_on(resume)) from error
    if not speaks:
        return
    try:
        save = results.save if of_lanczos is None else leading.save
        paths = save(result, folder, options=options_of(click.get_current_context()))
    except OSError:
        _show(result, form)  # also where quiet is asked for: it took the time that it took
        raise
    try:
        if not quiet:
            _show(result, form)
            click.echo(written(paths, folder), err=form == "json")
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the files are in {folder}") from error


def _how_to_go_on(resume: str) -> str:
    from fisherfunc.gradients.checkpoint import holds_parts

    if holds_parts(resume):
        return f"interrupted; run the same command again to go on from {resume}"
    return f"interrupted before anything was finished that {resume} could keep; the same command begins again"


def _check_checkpoint(checkpoint: str | None, options: Mapping[str, Any]) -> None:
    if checkpoint is not None and options["model"] is not None:
        raise click.UsageError("--checkpoint is of the embedded model; leave it out with --model")


def _of_lanczos(method: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Take the options of Lanczos out of those of a command; None where the method is another."""
    defaults: dict[str, Any] = {"leading": 20, "tolerance": 1e-2, "probes": 4, "trace": "estimated"}
    given = {name: options.pop(name) for name in defaults}
    if method == "exact":
        for name, value in given.items():
            if value is not None:
                raise click.UsageError(f"--{name} is of --method lanczos; give that, or leave it out")
        return None
    if options.pop("sketch") is not None:
        raise click.UsageError("--sketch has all eigenvalues, approximately, and --method lanczos some; leave out one")
    context = click.get_current_context()
    if context.get_parameter_source("blocks") is click.core.ParameterSource.DEFAULT:
        options["blocks"] = context.params["blocks"] = "whole"
    chosen = {name: defaults[name] if value is None else value for name, value in given.items()}
    return {
        "num_leading": chosen["leading"],
        "tolerance": chosen["tolerance"],
        "num_probes": chosen["probes"],
        "exact_trace": chosen["trace"] == "exact",
    }


def _show(result: Any, form: str) -> None:
    if form == "json":
        click.echo(json.dumps(result.to_dict(), allow_nan=False, indent=1))
        return
    from fisherfunc.pipeline.result import FisherSpectrum
    from fisherfunc.surface.jobs import leading
    from fisherfunc.surface.reports.report import report as table_of

    console = _console()
    shown = table_of if isinstance(result, FisherSpectrum) else leading.report
    console.print(shown(result, width=console.width))


cli.add_command(compare)
cli.add_command(report)
cli.add_command(check)
cli.add_command(run)
