"""`fisherfunc run`: the runs of a TOML file (run_file.py has the format), one after another."""

import platform
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from fisherfunc.surface.boundary import Failure, guarded
from fisherfunc.surface.visible import visible

_NOT_RECORDED = ("form", "quiet", "debug", "resume", "out")
"""How a run prints, and where it writes: not what it computes."""
HELP = """Do the runs of a TOML file: the run.toml of an output folder, or one with all runs of a paper.

Of a recorded run it uses the memory limit, threads and device that were used, says which versions differ, and whether
the eigenvalues are the same to the last bit (exit status 1 where they are not).

\b
  fisherfunc spectrum --out first
  fisherfunc run first/run.toml --out again

A file of several runs has a table for each, whose keys are the options of the command:

\b
  [defaults]
  dtype = "float64"
  [[run]]
  command = "spectrum"
  checkpoint = "init"
  out = "init"
  [[run]]
  command = "compare"
  results = ["init", "final"]
"""


@click.command(help=HELP, short_help="Repeat a run, or do all runs of a TOML file.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False), metavar="FILE")
@click.option("--out", type=click.Path(), metavar="DIR", help="Folder of the results, of a file with one run.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def run(context: click.Context, debug: bool, **options: Any) -> None:
    """Do the runs."""
    group: Any = context.parent and context.parent.command
    commands = {name: command for name, command in group.commands.items() if name != "run"}
    guarded(_do)(debug=debug, commands=commands, parent=context.parent, **options)


def _do(*, file: str, out: str | None, commands: dict[str, click.Command], parent: click.Context) -> None:
    import torch

    runs = read_runs(file, commands)
    if out is not None and len(runs) > 1:
        raise click.UsageError(
            f"--out is of a file with one run, and {file} has {len(runs)}; give each run its own out"
        )
    for each in runs:
        differing = differing_versions(each.made_with)
        if differing:
            click.echo(visible(f"versions differ: made with {'; '.join(differing)}"), err=True)
        folder = out or each.out
        words = [*each.arguments, *([f"--out={folder}"] if folder else [])]
        before = torch.get_num_threads()
        torch.set_num_threads(each.threads or before)
        try:
            with commands[each.command].make_context(each.command, words, parent=parent) as inner:
                inner.command.invoke(inner)
        finally:
            torch.set_num_threads(before)
        same = same_eigenvalues(each, folder) if folder else None
        if same is False:
            why = "; versions differ" if differing else "; the machine or its libraries may be others"
            raise Failure(f"the eigenvalues in {folder} are not to the bit those that were recorded{why}")
        if same:
            click.echo(visible(f"the eigenvalues in {folder} are those that were recorded, to the bit"), err=True)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a file.

    Attributes:
        command: Which command.
        arguments: Of its command line.
        out: Where its results go, where the file says.
        threads: Of torch; as they are where None.
        made_with: {package: version}, of a recorded run.
        sha256: Of the eigenvalues of a recorded run.
    """

    command: str
    arguments: tuple[str, ...]
    out: str | None = None
    threads: int | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None


def options_of(context: click.Context) -> dict[str, Any]:
    """What a command was called with, its defaults included, by the names that options have; what is unset is left out.

    Args:
        context: Of the command.
    """
    found: dict[str, Any] = {}
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name not in _NOT_RECORDED and value is not None and value is not False and value != ():
            found[_key(parameter)] = list(value) if isinstance(value, tuple) else value
    return found


def read_runs(path: str, commands: Mapping[str, click.Command]) -> list[Run]:
    """Read the runs of a file.

    Args:
        path: The file.
        commands: {name: command}.

    Raises:
        ValueError: If it is no TOML, or asks for what no command has; it says where, and what there is.
        OSError: If it cannot be read.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML ({error})") from error
    entries, defaults = content.get("run"), content.get("defaults", {})
    unknown = [key for key in content if key not in ("run", "defaults")]
    if not isinstance(entries, list) or not entries or not isinstance(defaults, dict):
        raise ValueError(f"{path} has no [[run]]; a run is a table with command = one of {list(commands)} and options")
    if unknown:
        raise ValueError(f"{path} has {unknown[0]!r} outside of a run; expected [[run]] and [defaults]")
    for key in defaults:
        if key != "threads" and not any(key in map(_key, command.params) for command in commands.values()):
            raise ValueError(f"{path}, [defaults]: no command has the option {key!r}")
    return [_run(f"{path}, run {number}", entry, defaults, commands) for number, entry in enumerate(entries, start=1)]


def differing_versions(made_with: Mapping[str, str]) -> list[str]:
    """Say how the versions of now differ from those that a run was made with."""
    now = {name: _version(name) for name in made_with}
    return [f"{name} {there}, here {now[name] or 'none'}" for name, there in made_with.items() if now[name] != there]


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def same_eigenvalues(run: Run, folder: str) -> bool | None:
    """Whether the eigenvalues in a folder are those of a recorded run, to the bit; None where none were recorded."""
    from fisherfunc.surface.jobs.run_file import sha256

    if run.sha256 is None:
        return None
    return sha256((Path(folder) / "eigenvalues.csv").read_text(encoding="utf-8")) == run.sha256


def _run(where: str, entry: Any, defaults: Mapping[str, Any], commands: Mapping[str, click.Command]) -> Run:
    if not isinstance(entry, dict) or entry.get("command") not in commands:
        named = entry.get("command") if isinstance(entry, dict) else entry
        raise ValueError(f"{where}: command expected one of {list(commands)}, got {named!r}")
    parameters = {_key(parameter): parameter for parameter in commands[entry["command"]].params}
    about = {key: entry[key] for key in ("command", "threads", "versions", "made") if key in entry}
    own = {key: value for key, value in entry.items() if key not in about}
    for key in own:
        if key not in parameters:
            raise ValueError(f"{where}: {entry['command']} has no option {key!r}; it has {sorted(parameters)}")
    values = {key: value for key, value in defaults.items() if key in parameters} | own
    out = values.pop("out", None)
    threads = about.get("threads", defaults.get("threads"))
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"{where}: threads expected a count, got {threads!r}")
    words = [word for key, value in values.items() for word in _words(where, key, parameters[key], value)]
    return Run(
        command=entry["command"],
        arguments=tuple(words),
        out=out,
        threads=threads,
        made_with=about.get("versions", {}),
        sha256=about.get("made", {}).get("sha256"),
    )


def _words(where: str, key: str, parameter: click.Parameter, value: Any) -> Iterator[str]:
    """A value as words of a command line. An argument is kept apart from options by its place: none begins with -."""
    several: Sequence[Any] = value if isinstance(value, list) else [value]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {key} is a flag, expected true or false, got {value!r}")
        yield from [parameter.opts[-1]] if value else []
        return
    for each in several:
        if isinstance(each, bool | dict | list):
            raise ValueError(f"{where}: {key} expected text or a number, got {each!r}")
        yield from [str(each)] if isinstance(parameter, click.Argument) else [f"{parameter.opts[0]}={each}"]


def _key(parameter: click.Parameter) -> str:
    return parameter.opts[0].lstrip("-") if isinstance(parameter, click.Option) else str(parameter.name)
