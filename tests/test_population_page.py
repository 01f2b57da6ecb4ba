"""docs/population.md does what it says: its Python runs, its links lead somewhere, and no table is missing."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "population.md").read_text(encoding="utf-8")


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, "population.md", "exec"), namespace)
    assert len(blocks) >= 4


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", PAGE))
def test_links_lead_somewhere(target):
    assert (REPOSITORY / "docs" / target).exists()


def test_the_tables_are_there():
    """Of single results and of ratios, each estimator of the simulation."""
    for estimator in ("trace", "participation ratio", "leading eigenvalue", "effective rank", "ratio of traces"):
        assert re.search(rf"^\| {estimator} \| 1/k", PAGE, re.MULTILINE), estimator
    assert "@@" not in PAGE and "MISSING" not in PAGE
