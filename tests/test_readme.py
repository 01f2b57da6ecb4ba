"""README.md does what it says: its Python runs, its commands are those of CI, its numbers those of the model's card."""

import re
from pathlib import Path

import pytest

from fisherfunc import assets
from fisherfunc.surface.cli import spectrum

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """Each block behind as many empty lines as come before it, so that a traceback names the line of README.md."""
    found = [match for match in FENCE.finditer(README) if match[1] == language]
    return ["\n" * README.count("\n", 0, match.start(2)) + match[2] for match in found]


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, str(REPOSITORY / "README.md"), "exec"), namespace)
    assert len(blocks("python")) >= 4


def test_the_two_commands_are_those_of_ci():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    gate = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^RUN_THE_\w+='(.*)'$", gate, re.MULTILINE) == commands
    assert len(commands) == 2


def test_every_option_of_the_command_line_is_explained_and_no_other():
    rows = re.findall(r"^\| `(--[a-z]+)", README, re.MULTILINE)
    assert sorted(rows) == sorted(option for parameter in spectrum.params for option in parameter.opts)


def test_the_losses_are_those_of_the_card():
    card = assets.model_card()
    for name in assets.CHECKPOINTS:
        facts = card["checkpoints"][name]
        assert f"| {name} | {facts['step']:,} | {facts['held_out_loss']:.2f} |" in README
    assert f"unigram baseline has {card['unigram_loss']:.2f}" in README


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target):
    assert (REPOSITORY / target).exists()
