"""docs/composing.md does what it says: its Python runs."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "composing.md"
TEXT = PAGE.read_text(encoding="utf-8")
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for match in FENCE.finditer(TEXT):
        lines = "\n" * TEXT.count("\n", 0, match.start(1))  # so that a traceback names the line of the page
        exec(compile(lines + match[1], str(PAGE), "exec"), namespace)
    assert len(FENCE.findall(TEXT)) >= 3
