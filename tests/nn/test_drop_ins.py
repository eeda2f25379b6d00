"""The examples of docs/drop-ins.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "drop-ins.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"## (.+?)\n(?:(?!## ).)*?```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_section_has_an_example():
    assert len(EXAMPLES) == TEXT.count("```python") == len(re.findall(r"^## ", TEXT, flags=re.MULTILINE))


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example(title, code):
    exec(compile(code, f"docs/drop-ins.md: {title}", "exec"), {})
