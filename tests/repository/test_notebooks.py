"""The notebooks: sources and executed ones hold the same cells, each asks a question, and each was run to its end."""

import re

import jupytext
import nbformat
import pytest
from folders import REPOSITORY

FOLDER = REPOSITORY / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
SEVEN = ("first_steps", "composing", "known_science", "training_checkpoints", "leading_tokens", "own_model")
SEVEN += ("how_many_tokens",)


def of(name):
    return jupytext.read(FOLDER / f"{name}.py"), nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_every_notebook_has_a_source_and_the_seven_are_there():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    assert set(SEVEN) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_source_and_notebook_hold_the_same_cells(name):
    source, notebook = of(name)
    for cells in zip(source.cells, notebook.cells, strict=True):
        here, there = ((cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in cells)
        assert here == there


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_run_from_its_beginning_to_its_end(name):
    _, notebook = of(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)) and outputs
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"site-packages|/home/|/root/|/tmp/", str(outputs))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_with_a_question_and_ends_with_what_was_found(name):
    _, notebook = of(name)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert (first.cell_type, last.cell_type) == ("markdown", "markdown")
    assert first.source.startswith("# ") and "?" in first.source
