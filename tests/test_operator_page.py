"""docs/operators.md: its Python runs, in order."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, namespace = PAGE.read_text(encoding="utf-8"), {}
    found = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for block in found:
        lines = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback names the line of the page
        exec(compile(lines + block[1], str(PAGE), "exec"), namespace)
    assert len(found) >= 3
