"""The command's edges: interrupts, readers that leave, libraries that talk."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import click
import hf_folders
import pytest
from click.testing import CliRunner
from commands import run, tiny

import fisherfunc
from fisherfunc.__main__ import main
from fisherfunc.surface import boundary
from fisherfunc.surface.cli import cli
from fisherfunc.surface.jobs import job
from fisherfunc.surface.terminal import console

QUICK = ["--tokens", 9]
INTERRUPTED = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = ["fisherfunc", "spectrum"]
from fisherfunc.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["click", "torch", "numpy"])
def test_an_interrupt_while_packages_are_imported_is_one_line(tmp_path, name):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(name=name)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fisherfunc.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fisherfunc: interrupted; nothing was written\n")


def test_importing_the_package_imports_nothing_that_takes_time():
    code = "import sys, fisherfunc.__main__; print({'torch', 'numpy', 'click', 'transformers'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "set()\n"


def test_the_names_that_are_imported_later_are_those_that_are_promised():
    import fisherfunc as ff

    assert {*ff._MODULES, *ff._PLACES} == {*ff.__all__, "testing"}
    assert all(getattr(ff, name) is not None for name in ff.__all__)
    assert {*ff.__all__} <= {*dir(ff)}
    with pytest.raises(AttributeError, match="has no attribute 'spectre'"):
        ff.spectre  # noqa: B018 (the error is the point)


def test_main_leaves_the_handler_of_interrupts_to_the_commands(monkeypatch):
    seen = []
    monkeypatch.setattr("fisherfunc.surface.cli.cli", lambda **_: seen.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.default_int_handler, signal.SIG_IGN]


@pytest.mark.parametrize("options", [[], ["--format", "json"]])
@pytest.mark.parametrize("command", ["spectrum", "tokens", "plan"])
def test_a_reader_that_leaves_is_no_failure(hub, here, monkeypatch, command, options):
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    def gone_in_rich(*_, **__):
        try:
            gone()
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 (as rich does it)

    monkeypatch.setattr("rich.console.Console.print", gone_in_rich)
    monkeypatch.setattr(click, "echo", gone)
    ran = CliRunner().invoke(cli, [command, *map(str, [*tiny(hub), *QUICK, *options])], prog_name="fisherfunc")
    assert (ran.exit_code, ran.stderr) == (0, "")


def test_an_interrupt_of_a_command_has_one_line(hub, here, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "predict", stop)
    ran = CliRunner().invoke(cli, ["plan"], prog_name="fisherfunc")
    assert (ran.exit_code, ran.stderr) == (130, "fisherfunc: interrupted; nothing was written\n")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes\nmore")]
)
def test_out_of_memory_says_which_options_help(hub, here, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(job, "compute", fail)
    ran = run(*tiny(hub))
    assert ran.exit_code == 1 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("fisherfunc: error: out of memory (")
    assert ran.stderr.endswith("give a smaller --memory or fewer --tokens\n")


def test_libraries_do_not_talk_in_quiet(hub, here, capfd):
    """A font without the letters of a name has Matplotlib warn of each of them."""
    folder = hf_folders.copy(hub / "gpt2", here / "日本")
    with warnings.catch_warnings():
        ran = run("--model", folder, "--text", hub / "text.txt", *QUICK, "--out", "o", "--quiet")
    assert (ran.exit_code, ran.output) == (0, "")
    assert capfd.readouterr().err == ""


def test_an_end_of_file_is_an_error_and_no_interrupt():
    @click.command()
    @click.option("--debug", is_flag=True)
    @boundary.guarded
    def damaged():
        raise EOFError("Ran out of input")

    group = boundary.Group(commands={"damaged": damaged})
    ran = CliRunner().invoke(group, ["damaged"])
    assert (ran.exit_code, ran.stderr) == (1, "fisherfunc: error: Ran out of input\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fisherfunc sp", "spectrum"),
        ("fisherfunc spectrum --blo", "--blocks"),
        ("fisherfunc spectrum --blocks ", "head"),
    ],
)
def test_commands_options_and_values_are_completed(words, offered):
    count = len(words.split(" ")) - 1
    env = {"_FISHERFUNC_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    ran = CliRunner().invoke(cli, [], env=env, prog_name="fisherfunc")
    assert ran.exit_code == 0 and f"plain,{offered}" in ran.stdout.splitlines()


@pytest.mark.parametrize("plain", [True, False])
def test_with_no_color_nothing_is_coloured(plain, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    console().print("[red]word")
    assert ("\x1b[31m" in capsys.readouterr().out) != plain
