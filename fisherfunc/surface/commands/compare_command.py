"""`fisherfunc compare`: results side by side, printed and drawn."""

import json
from typing import Any

import click

from fisherfunc.linalg.metrics import SUMMARY
from fisherfunc.pipeline.comparing.compare import ACROSS
from fisherfunc.surface.boundary import Interrupted, guarded
from fisherfunc.surface.commands.format_options import FORMAT, as_options
from fisherfunc.surface.commands.run_command import options_of
from fisherfunc.surface.terminal import console, hush, written

DEFAULT_METRICS = ("largest", "trace", "effective_rank")
HELP = """Line up several results of `fisherfunc spectrum`: checkpoints, models or data sets.

Each RESULT is a folder that `fisherfunc spectrum` or a recorder wrote, or its spectrum.json; a checkpoint of
the embedded model (init, early, middle, final) is computed where no such folder is here. The first is what
the others are held against: beside each number stands its ratio to that of the first. Results whose names
differ in one number, checkpoint-50 and checkpoint-1000, are in the order of that number.

Results that differ in unit or normalisation are refused, and so are those that differ in Fisher, loss,
tokens, centring or rule of blocks, unless --across says that this is what the comparison is of.

\b
Examples:
  fisherfunc compare init early middle final
  fisherfunc compare run/step-* --metric largest --metric condition_number
  fisherfunc compare of-english of-french --across tokens
  fisherfunc compare before after --format json | jq .ratios.full.trace
"""


@click.command(help=HELP, short_help="Several results side by side.")
@click.argument("results", nargs=-1, required=True, metavar="RESULT RESULT...")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    type=click.Choice(list(SUMMARY)),
    default=DEFAULT_METRICS,
    metavar="NAME",
    help="Print and draw this one; may be repeated.  [default: " + ", ".join(DEFAULT_METRICS) + "]",
)
@click.option(
    "--across",
    multiple=True,
    type=click.Choice(list(ACROSS)),
    metavar="WHAT",
    help="Allow results to differ in: " + ", ".join(ACROSS) + ".",
)
@as_options(*FORMAT)
@click.option("--quiet", is_flag=True, help="Print nothing but errors; the files are written.")
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    default="comparison",
    show_default=True,
    metavar="DIR",
    help="Folder of comparison.json, comparison.png and .svg.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@guarded
def compare(
    results: tuple[str, ...], metrics: tuple[str, ...], across: tuple[str, ...], form: str, quiet: bool, out: str
) -> None:
    """Read, compare, print, draw."""
    from fisherfunc.surface.jobs import compare_job
    from fisherfunc.surface.progress import progress_bar

    hush()
    compare_job.check(results, out)
    with progress_bar(quiet=quiet) as progress:
        found = compare_job.compared(results, across=across, progress=progress)
    try:
        paths = compare_job.save(found, out, metrics=metrics, options=options_of(click.get_current_context()))
    except OSError:
        _show(found, form, metrics)  # also where quiet is asked for: checkpoints may have been computed for it
        raise
    try:
        if not quiet:
            _show(found, form, metrics)
            click.echo(written(paths, out), err=form == "json")
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; the files are in {out}") from error


def _show(found: Any, form: str, metrics: tuple[str, ...]) -> None:
    if form == "json":
        click.echo(json.dumps(found.to_dict(), allow_nan=False, indent=1))
        return
    from fisherfunc.surface.reports.compare_report import compare_report

    terminal = console()
    terminal.print(compare_report(found, metrics=metrics, width=terminal.width))
