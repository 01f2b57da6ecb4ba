"""No table of docs/population.md is missing; that its Python runs is for test_readme.py."""

import re

from folders import REPOSITORY

PAGE = (REPOSITORY / "docs" / "population.md").read_text(encoding="utf-8")


def test_the_tables_are_there():
    """Of single results and of ratios, each estimator of the simulation."""
    for estimator in ("trace", "participation ratio", "leading eigenvalue", "effective rank", "ratio of traces"):
        assert re.search(rf"^\| {estimator} \| 1/k", PAGE, re.MULTILINE), estimator
    assert "@@" not in PAGE and "MISSING" not in PAGE
