"""Plans as a table and as JSON, and the command that prints them. Nothing is timed."""

import io
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from commands import process as start
from commands import tiny
from plans import language, planned
from rich.console import Console
from torch import nn

from fisherfunc.records.provenance import Provenance
from fisherfunc.surface.cli import cli
from fisherfunc.surface.reports.plan_report import plan_report, size, summary


def printed(plan, facts):
    console = Console(width=200, file=io.StringIO())
    console.print(plan_report(plan, facts, width=200))
    return console.file.getvalue()


def test_the_table_has_every_figure():
    plan = replace(planned(*language()), seconds={"passes": 1.25, "total": 1.25})
    text = printed(plan, Provenance(model_id="a/b", unit="token"))
    assert "Plan for a/b" in text
    for name, cost in plan.parameters.items():
        assert name in text and cost.why in text
    for line in summary(plan, Provenance()):
        assert line in text
    assert f"Peak memory beyond the model: {size(plan.peak_bytes)}" in text
    assert "Seconds: 1.2" in text


def test_repeated_layers_are_one_line():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    plan = planned(model, (torch.randn(6, 4), torch.arange(6) % 4))
    assert sum("4 times" in line or "5 times" in line for line in printed(plan, Provenance()).splitlines()) == 2


def command(*arguments):
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)], prog_name="fisherfunc")


def test_the_command_plans_what_the_other_command_runs(hub, here):
    options = [*tiny(hub), "--tokens", 20, "--context", 12, "--seed", 3, "--blocks", "module", "--memory", "1GB"]
    ran = command(*options, "--format", "json")
    assert (ran.exit_code, ran.stderr) == (0, ""), ran.stderr
    plan = json.loads(ran.stdout)
    done = CliRunner().invoke(cli, ["spectrum", *map(str, options), "--format", "json"])
    facts = json.loads(done.stdout)["metadata"]
    assert {**facts["plan"], "seconds": plan["seconds"], "rates": plan["rates"]} == {
        key: value for key, value in plan.items() if key != "metadata"
    }
    assert plan["metadata"]["context"] == facts["context"] == 12
    assert list(here.iterdir()) == [here / "gpt2"]  # of the second command


def test_the_command_runs_on_the_embedded_model(here, tmp_path):
    process = start("plan", "--tokens", 100, cwd=here, tmp_path=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "Plan for sotu-llama/final" in out and "100 tokens of" in out and "Seconds:" in out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--memory", "lots"], 2, "a memory size like"),
        (["--model", "x", "--checkpoint", "init"], 2, "--checkpoint is of the embedded model"),
        (["--memory", "1kB"], 1, "is below the"),
        (["--tokens", "1000000"], 1, "asks for more predictions"),
        (["--out", "x"], 2, "--out"),
    ],
)
def test_the_command_says_what_is_wrong(here, options, status, message):
    ran = command(*options)
    assert (ran.exit_code, ran.stdout) == (status, "")
    assert message in ran.stderr
