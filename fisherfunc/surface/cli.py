"""The command line. Commands only read their options; the work is in job.py, the words in report.py."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import click

from fisherfunc.surface.boundary import Group, Interrupted, guarded

_WIDTH_OF_A_FILE = 120
SPECTRUM_HELP = """Compute the exact spectrum of the per-token empirical Fisher of a language model.

With F = (1/N) Σ g gᵀ over the gradients g of the N token losses, this prints the eigenvalue metrics of each
block of F, of its block-diagonal part and of the full matrix, and writes spectrum.json (everything),
eigenvalues.csv, spectrum.png/.svg and couplings.png/.svg into --out. Without arguments it runs a small model
and a text that come with the package. --targets makes it the true Fisher.

\b
Examples:
  fisherfunc spectrum
  fisherfunc spectrum --checkpoint init --out before-training
  fisherfunc spectrum --model ./my-model --text book.txt --tokens 1024
  fisherfunc spectrum --model gpt2 --text - --blocks module < book.txt
  fisherfunc spectrum --targets sampled --draws 4 --tokens 128
  fisherfunc spectrum --tokens 2048 --intervals jackknife
  fisherfunc spectrum --format json | jq .full.effective_rank
  fisherfunc spectrum --model ./large --text book.txt --resume ./kept

\b
Columns of the table:
  tokens            N, what F is an average over
  parameters        P, the size of the block
  λ_max, λ_2        the two largest eigenvalues; gap is their difference
  condition number  λ_max over the smallest eigenvalue above the resolution
  eff. rank         exp of the entropy of λ/Σλ: how many directions matter
  trace             Σλ, the mean squared norm of a token's gradient

\b
Windows of text are consecutive, from the beginning of the file:
  causal models         each token of a window but its first is predicted
  masked models         15 % of its tokens, chosen by --seed, are predicted
  sequence-to-sequence  the first half is read, the second predicted
"""

PLAN_HELP = """Predict what `fisherfunc spectrum` would do with the same options, and what it would take.

No token is passed over and no file is written: a forward pass finds the tokens, a probe the structure of the model,
and about a second of calibration the speed of this machine.

\b
Examples:
  fisherfunc plan
  fisherfunc plan --model gpt2 --text book.txt --tokens 1024 --memory 2GB
  fisherfunc plan --format json | jq .seconds.total

\b
Routes of parameters:
  pairwise      inner products of output cotangents and of inputs; no gradient is formed
  points        the same where a weight acts at one place of a sequence
  output layer  the same, in closed form
  rows          gradients are formed, where that is cheaper
  elementwise   gradients of biases, norms and such
  autograd      gradients are formed, as no rule knows the use; the table says which
  slabs         gradients are formed slab by slab: it does not fit the memory limit otherwise
"""


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
    from fisherfunc.surface.job import parse_bytes

    try:
        return parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_TEXT = click.Path(exists=True, dir_okay=False, allow_dash=True)
_COUNT = click.IntRange(min=1)
_CHECKPOINT = click.Choice(["init", "early", "middle", "final"])
_DTYPE = click.Choice(["float32", "float64", "bfloat16"])
_FORM = click.Choice(["table", "json"])


_BLOCKS = click.Choice(["layer", "module", "parameter", "whole"])
_TASK = (
    click.option("--model", metavar="ID_OR_FOLDER", help="Hugging Face folder or hub id.  [default: embedded]"),
    click.option("--text", type=_TEXT, metavar="FILE", help="UTF-8 text; - is stdin.  [default: embedded]"),
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
)
_TARGETS = click.Choice(["observed", "sampled", "all-classes"])
_CENTER = click.option("--center", is_flag=True, help="Subtract the mean gradient: the gradient covariance.")
_INTERVALS = click.option(
    "--intervals",
    type=click.Choice(["bootstrap", "jackknife"]),
    help="Confidence intervals of all metrics, over windows of text.",
)
_PASS = (
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
    click.option("--dtype", type=_DTYPE, default="float32", show_default=True, help="Of weights and gradients."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …; auto prefers cuda."),
    click.option(
        "--memory",
        "memory_limit",
        callback=_memory,
        metavar="SIZE",
        help="Limit of the pass: 2GB, 500MB, 1.5GiB.  [default: half of what is free]",
    ),
    click.option("--format", "form", type=_FORM, default="table", show_default=True, help="What to print."),
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
        help="Keep what is done in this folder; the same command goes on from there.",
    ),
)
_DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an error.")


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds some options, in this order."""
    return lambda command: reduce(lambda inner, option: option(inner), reversed(options), command)


@cli.command(help=SPECTRUM_HELP, short_help="The spectrum of a language model's empirical Fisher.")
@_options(*_TASK, _CENTER, _INTERVALS, *_PASS, *_OUTPUT, _DEBUG)
@guarded
def spectrum(
    form: str, quiet: bool, out: str | None, checkpoint: str | None, resume: str | None, **options: Any
) -> None:
    """Run the main job."""
    _check_checkpoint(checkpoint, options)
    from fisherfunc.surface import job
    from fisherfunc.surface.progress import progress_bar

    _hush()
    task = job.Job(checkpoint=checkpoint or "final", **options)
    folder = out or task.folder
    job.check_output(folder)
    try:
        with progress_bar(quiet=quiet) as progress:
            result = job.compute(task, progress=progress, checkpoint=resume)
    except KeyboardInterrupt as error:
        if resume is None:
            raise
        raise Interrupted(f"interrupted; run the same command again to go on from {resume}") from error
    paths = job.save(result, folder)
    try:
        if not quiet:
            _show(result, form)
            click.echo(f"wrote {', '.join(path.name for path in paths)} into {folder}", err=form == "json")
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the files are in {folder}") from error


@cli.command(help=PLAN_HELP, short_help="What `spectrum` would do, and the time and memory it would take.")
@_options(*_TASK, *_PASS, _DEBUG)
@guarded
def plan(form: str, checkpoint: str | None, **options: Any) -> None:
    """Predict the main job."""
    _check_checkpoint(checkpoint, options)
    from fisherfunc.surface import job

    _hush()
    found, facts = job.predict(job.Job(checkpoint=checkpoint or "final", **options))
    if form == "json":
        click.echo(json.dumps({"metadata": facts, **found.to_dict()}, allow_nan=False, indent=1))
        return
    from fisherfunc.surface.plan_report import plan_report

    _console().print(plan_report(found, facts))


def _check_checkpoint(checkpoint: str | None, options: Mapping[str, Any]) -> None:
    if checkpoint is not None and options["model"] is not None:
        raise click.UsageError("--checkpoint is of the embedded model; leave it out with --model")


def _show(result: Any, form: str) -> None:
    if form == "json":
        click.echo(json.dumps(result.to_dict(), allow_nan=False, indent=1))
        return
    from fisherfunc.surface.report import report

    console = _console()
    console.print(report(result, width=console.width))


def _console() -> Any:
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_WIDTH_OF_A_FILE)


def _hush() -> None:
    """No bars and no advice from Transformers: what matters is raised."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        logging = sys.modules["transformers"].utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
