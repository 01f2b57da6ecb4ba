"""`fisherfunc report`: a page of HTML from folders of results."""

import click

from fisherfunc.surface.boundary import guarded
from fisherfunc.surface.visible import visible

HELP = """Write one page of HTML of the results in one or more folders: what was measured, tables, plots, warnings.

The page needs no other file and no network. It is FOLDER/report.html; of several folders report.html where the
command runs. Tokens that carry the leading directions are on it where the folder has a tokens.json:

\b
  fisherfunc spectrum --out run
  fisherfunc tokens --json > run/tokens.json
  fisherfunc report run
"""


@click.command(help=HELP, short_help="A page of HTML of results.")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE", help="Where the page goes.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@guarded
def report(folders: tuple[str, ...], out: str | None) -> None:
    """Write the page."""
    from fisherfunc.surface.reports.html_report import report_of

    click.echo(visible(f"wrote {report_of(folders, out=out)}"))
