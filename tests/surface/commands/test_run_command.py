"""`run.toml` and `fisherfunc run`: a run is repeated to the bit, what differs is said, a paper's runs are one file."""

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
import torch
from click.testing import CliRunner
from commands import run as spectrum
from commands import tiny

import fisherfunc as ff
from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.cli import cli
from fisherfunc.surface.commands.run_command import options_of, read_runs
from fisherfunc.surface.files import read_provenance
from fisherfunc.surface.jobs.run_file import run_toml

COMMANDS = {name: command for name, command in cli.commands.items() if name != "run"}


def again(*arguments):
    return CliRunner().invoke(cli, ["run", *map(str, arguments)], prog_name="fisherfunc")


def written(content):
    Path("runs.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    return "runs.toml"


def rewritten(folder, change):
    path = Path(folder) / "run.toml"
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    change(content["run"][0])
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_a_run_is_repeated_to_the_bit_with_the_memory_and_threads_that_it_had(hub, here, method):
    options = ["--tokens", 12, "--context", 8, "--method", method, "--out", "first", "--quiet"]
    assert spectrum(*tiny(hub), *options, *(["--memory", "90MB"] if method == "exact" else [])).exit_code == 0
    recorded = tomllib.loads((here / "first" / "run.toml").read_text(encoding="utf-8"))["run"][0]
    assert (recorded["device"], recorded["threads"]) == ("cpu", torch.get_num_threads())
    assert recorded["versions"] == read_provenance(here / "first" / "spectrum.json").versions
    assert recorded.get("memory") == ("90000000" if method == "exact" else None)
    seen, threads = [], torch.get_num_threads()
    callback = cli.commands["spectrum"].callback
    try:
        cli.commands["spectrum"].callback = lambda **o: (seen.append(torch.get_num_threads()), callback(**o))[1]
        torch.set_num_threads(threads + 1)
        ran = again("first/run.toml", "--out", "second")
        assert torch.get_num_threads() == threads + 1
    finally:
        cli.commands["spectrum"].callback = callback
        torch.set_num_threads(threads)
    assert ran.exit_code == 0 and "those that were recorded, to the bit" in ran.stderr and "versions" not in ran.stderr
    assert seen == [threads]
    assert (here / "first/eigenvalues.csv").read_bytes() == (here / "second/eigenvalues.csv").read_bytes()


def test_without_a_limit_the_one_that_was_free_is_recorded_and_used(hub, here):
    assert spectrum(*tiny(hub), "--tokens", 9, "--out", "a", "--quiet").exit_code == 0
    limit = read_provenance("a/spectrum.json").plan["memory_limit"]
    rewritten("a", lambda one: one.update(memory=str(int(one["memory"]) - limit // 2)))
    assert again("a/run.toml", "--out", "b").exit_code == 0
    assert read_provenance("b/spectrum.json").plan["memory_limit"] == limit - limit // 2


def test_other_versions_are_said_and_other_eigenvalues_are_a_failure(hub, here):
    assert spectrum(*tiny(hub), "--tokens", 9, "--out", "a", "--quiet").exit_code == 0
    path = rewritten("a", lambda one: one["versions"].update(torch="1.0", absent="3"))
    ran = again(path)
    assert ran.exit_code == 0
    assert f"versions differ: made with torch 1.0, here {torch.__version__}; absent 3, here none" in ran.stderr
    other = again(rewritten("a", lambda one: one.update(seed=1)))
    assert other.exit_code == 1 and "in a are not to the bit those that were recorded" in other.stderr


def test_the_runs_of_a_paper_are_one_file(hub, here):
    model = {"command": "spectrum", "model": str(hub / "gpt2"), "text": str(hub / "text.txt"), "center": False}
    runs = [
        {**model, "out": "a"},
        {**model, "out": "b", "center": True, "tokens": 8},
        {"command": "compare", "results": ["a", "b"], "across": ["centered", "tokens"], "metric": ["trace"]},
        {"command": "report", "folders": ["a"]},
    ]
    ran = again(written({"defaults": {"tokens": 9, "quiet": True, "context": 8}, "run": runs}))
    assert (ran.exit_code, ran.stderr) == (0, "")
    found = [read_provenance(f"{name}/spectrum.json") for name in "ab"]
    assert [(facts.num_tokens, facts.centered) for facts in found] == [(9, False), (8, True)]
    assert (here / "comparison" / "run.toml").exists() and (here / "a" / "report.html").exists()
    assert again("comparison/run.toml", "--out", "other").exit_code == 0
    assert (here / "other/comparison.json").read_bytes() == (here / "comparison/comparison.json").read_bytes()


WORDS = {
    "spectrum": "--model m --text - --blocks module --tokens 3 --context 4 --seed 5 --bos never --center --memory 2GB "
    "--intervals jackknife --unit sequence --targets sampled --draws 2 --dtype float64 --device cuda:1",
    "compare": "a b --metric trace --metric gap --across tokens",
}


@pytest.mark.parametrize("command", WORDS)
def test_what_is_recorded_is_read_back_as_the_same_options(command, here):
    with COMMANDS[command].make_context(command, WORDS[command].split()) as context:
        options = options_of(context)
    Path("run.toml").write_text(run_toml(command, options, Provenance(), out="o", eigenvalues=None), encoding="utf-8")
    (found,) = read_runs("run.toml", COMMANDS)
    with COMMANDS[command].make_context(command, list(found.arguments)) as repeated:
        assert {**repeated.params, "out": None} == {**context.params, "out": None}
    assert found.out == "o" and found.threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run = ", r"is not valid TOML"),
        ("tokens = 3", r"has no \[\[run\]\]; a run is a table"),
        ("run = [3]", r"run 1: command expected one of .*, got 3"),
        ('[[run]]\ncommand = "run"', r"run 1: command expected one of .*'spectrum'.*, got 'run'"),
        ('[[run]]\ncommand = "check"\n[other]', r"has 'other' outside of a run"),
        ('[[run]]\ncommand = "check"\nseed = 3', r"run 1: check has no option 'seed'; it has \['context'"),
        ('[defaults]\nspeed = 3\n[[run]]\ncommand = "check"', r"no command has the option 'speed'"),
        ('[[run]]\ncommand = "spectrum"\ncenter = "yes"', r"center is a flag, expected true or false, got 'yes'"),
        ('[[run]]\ncommand = "spectrum"\ntokens = true', r"tokens expected text or a number, got True"),
        ('[[run]]\ncommand = "check"\nthreads = 0', r"threads expected a count, got 0"),
        ('[[run]]\ncommand = "spectrum"\ntokens = -3', r"Invalid value for '--tokens'"),
        ('[[run]]\ncommand = "check"\n[[run]]\ncommand = "check"', r"--out is of a file with one run, and .* has 2"),
    ],
)
def test_a_file_that_asks_for_what_there_is_not_is_one_line_of_error(text, says, here):
    Path("runs.toml").write_text(text, encoding="utf-8")
    ran = again("runs.toml", "--out", "here")
    assert ran.exit_code in (1, 2) and ran.stdout == "" and len(ran.stderr.splitlines()) == 1
    assert re.search(says, ran.stderr), ran.stderr


def test_a_folder_of_a_recorder_says_what_it_was_made_with(here):
    model, batch = torch.nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    ff.SpectrumRecorder(batch, folder="run")(model, 0)
    content = tomllib.loads(Path("run/step-00000000/run.toml").read_text(encoding="utf-8"))
    assert content["versions"]["torch"] == torch.__version__ and content["device"] == "cpu" and content["memory"]
    ran = again("run/step-00000000/run.toml")
    assert ran.exit_code == 1 and "has no [[run]]" in ran.stderr
