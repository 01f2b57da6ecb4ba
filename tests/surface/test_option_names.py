"""What the command says of an error names its own options: of every message of the library that it can meet."""

import ast
import re
from pathlib import Path

import pytest

import fisherfunc
from fisherfunc.surface.cli import cli
from fisherfunc.surface.option_names import in_options

OPTIONS = {option for command in cli.commands.values() for param in command.params for option in param.opts}
PYTHONS = "(an argument of Python's fisherfunc.fisher_spectrum, not of this command)"
HAS_AN_OPTION = re.compile(
    r"\b(memory_limit|num_tokens|unit|targets|intervals|context|checkpoint|bos|num_draws)=|\bnum_tokens\b"
)


def messages():
    """The text of every exception that is raised below the surface, with a 7 for each value in it."""
    for layer in ("gradients", "linalg", "models", "pipeline", "statistics", "records"):
        for path in (Path(fisherfunc.__file__).parent / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    yield path.name, text_of(node.exc.args[0])


def text_of(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return str(node.value) if isinstance(node, ast.Constant) else "7"


def test_no_message_is_left_with_an_argument_that_the_command_has_an_option_for():
    found = {(name, text): in_options(text) for name, text in messages()}
    assert len(found) > 100
    assert {key: said for key, said in found.items() if "drop_nonfinite" in said and "in Python" not in said} == {}
    for said in found.values():
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", said))
        assert options <= OPTIONS, said


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("memory_limit=1000 bytes is below 9; lower num_tokens", "--memory 1000 is below 9; lower --tokens"),
        ("take targets=ff.targets.sampled(num_draws=...), or unit='token'", "take --targets sampled, or --unit token"),
        ("targets=all_classes() has 5 rows, memory_limit is 3", "--targets all-classes has 5 rows, --memory is 3"),
        ("intervals='bootstrap' needs 2 sequences", "--intervals bootstrap needs 2 sequences"),
        ("checkpoint='a b' is a file; give a folder", "--resume 'a b' is a file; give a folder"),
        ("context=1 leaves no token; bos='always'", "--context 1 leaves no token; --bos always"),
        ("use route='dense' for it", f"use route='dense' for it {PYTHONS}"),
        ("cannot write into o (full); choose another one", "cannot write into o (full); choose another --out"),
        ("nothing to say in other words", "nothing to say in other words"),
    ],
)
def test_messages_in_the_words_of_the_command(message, said):
    assert in_options(message) == said


def test_leaving_out_what_is_not_finite_is_said_to_be_pythons():
    for name, text in messages():
        if "drop_nonfinite=True" in text:
            assert "--dtype float64, or in Python drop_nonfinite=True of fisherfunc.fisher_spectrum" in in_options(
                text
            ), name
