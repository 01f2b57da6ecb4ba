"""The tables of docs/population.md are those of the simulation; that its Python runs is for test_readme.py."""

import re

import pytest
from folders import REPOSITORY

from benchmarks.coverage import pooled, read, tables

PAGE = (REPOSITORY / "docs" / "population.md").read_text(encoding="utf-8")
CELLS = pooled(read(REPOSITORY / "benchmarks" / "coverage.jsonl"))


@pytest.mark.parametrize("count", [8, 20, 50])
def test_a_table_is_that_of_the_cells_measured(count):
    assert tables(CELLS)[count] in PAGE


def test_the_page_counts_the_cells_that_fall_short():
    short = [cell for cell in CELLS if cell.falls_short or cell.is_biased]
    assert f"{len(short)} of {len(CELLS)} cells" in PAGE


def test_the_table_of_ratios_is_there():
    assert re.search(r"^\| ratio of traces \| 1/k", PAGE, re.MULTILINE)
