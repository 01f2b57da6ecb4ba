"""README.md and docs/ do what they say: Python runs, links lead somewhere, commands are those of CI."""

import re
import sys
from types import ModuleType

import pytest
import yaml
from folders import REPOSITORY

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.surface.cli import spectrum

DOCS = REPOSITORY / "docs"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = sorted(DOCS.rglob("*.md"))
LINKED = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Each block behind as many empty lines as come before it, so that a traceback names the line of the page."""
    found = [match for match in FENCE.finditer(text) if match[1] == language]
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


@pytest.mark.filterwarnings("ignore::UserWarning:(backpack|opacus|torch|nngeometry).*")
@pytest.mark.parametrize("path", [REPOSITORY / "README.md", *PAGES], ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_the_python_blocks_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": path.stem}
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        exec(compile(block, str(path), "exec"), namespace)


def test_there_are_blocks_to_run():
    """A fence that is not read would pass unseen: all fences are read, and those that must have code have it."""
    for text in (README, *(path.read_text(encoding="utf-8") for path in PAGES)):
        assert 2 * len(FENCE.findall(text)) == len(re.findall(r"^```", text, re.MULTILINE))
    assert len(blocks(README, "python")) >= 2
    assert len(blocks(page("coming-from.md"), "python")) >= 6


def test_the_readme_is_what_a_newcomer_reads():
    assert len(README) <= 9000


def test_the_two_commands_are_those_of_ci():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    gate = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"^RUN_THE_\w+='(.*)'$", gate, re.MULTILINE) == commands
    assert len(commands) == 2
    for text in (page("start.md"), (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        repeated = re.findall(r"^python3 -m venv .*$", text, re.MULTILINE)
        assert repeated and set(repeated) <= set(commands)


def test_every_option_of_the_command_line_is_explained_and_no_other():
    rows = re.findall(r"^\| `(--[a-z]+)", page("command-line.md"), re.MULTILINE)
    assert sorted(rows) == sorted(option for parameter in spectrum.params for option in parameter.opts)


def test_the_losses_are_those_of_the_card():
    card, text = assets.model_card(), page("embedded-model.md")
    for name in assets.CHECKPOINTS:
        facts = card["checkpoints"][name]
        assert f"| {name} | {facts['step']:,} | {facts['held_out_loss']:.2f} |" in text
    assert f"unigram baseline has {card['unigram_loss']:.2f}" in text


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """To a file of the repository; from a page of the site to another one, which is what the site has."""
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target
        assert path.parent == REPOSITORY or (path.parent / target).resolve().is_relative_to(DOCS), target


def test_a_doi_is_linked_to_itself():
    found = re.findall(r"\[(10\.[^\]]+)\]\(https://doi\.org/([^)]+)\)", page("mathematics.md"))
    assert len(found) == page("mathematics.md").count("https://doi.org/") >= 12
    assert all(shown == target and re.fullmatch(r"10\.\d{4,5}/\S+", shown) for shown, target in found)


def _pages_of(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [name for child in children for name in _pages_of(child)]


def test_every_page_is_in_the_navigation():
    settings = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    named = _pages_of(yaml.safe_load(settings)["nav"])
    assert len(named) == len(set(named))
    assert {str(path.relative_to(DOCS)) for path in PAGES} <= set(named)


def test_the_reference_has_every_public_name():
    """Functions and records by their own directive; a space by its module's, and what submodules of their name hide."""
    directives = re.findall(r"^::: (fisherfunc[\w.]*)$", page("reference.md"), re.MULTILINE)
    wanted = set()
    for name in [*ff.__all__, "testing"]:
        value = getattr(ff, name)
        if not isinstance(value, ModuleType):
            own = f"{value.__module__}.{value.__name__}"  # Griffe takes a module of the same name
            wanted.add(own if own in directives else f"fisherfunc.{name}")
            continue
        wanted.add(value.__name__)
        hidden = (n for n in getattr(value, "__all__", ()) if f"{value.__name__}.{n}" in sys.modules)
        wanted |= {f"{value.__name__}.{n}.{n}" for n in hidden}
    assert wanted <= set(directives) and len(directives) == len(set(directives))


def test_the_map_of_the_code_names_files_that_exist():
    walk = re.findall(r"^\d+\. `([\w/]+\.py)`", page("code-map.md"), re.MULTILINE)
    assert 10 <= len(walk) <= 13
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", page("code-map.md"))
    for name in named:
        assert (REPOSITORY / "fisherfunc" / name).exists() or (REPOSITORY / name).exists(), name


def test_the_laws_of_the_documentation_are_those_of_the_testing_kit():
    rows = [f"| {law.name} | {law.applies_to} | {law.tolerance:g} | {law.statement} |" for law in ff.testing.laws]
    assert "\n".join(rows) in page("how-to/testing.md")
