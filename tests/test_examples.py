"""The Python examples of README and docs run as they stand there; a new page with examples is found by itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastkd import ops

ROOT = Path(__file__).resolve().parents[1]
STAND_ALONE = ("drop-ins.md", "ops.md")
"""Pages whose examples can each be copied without those before it; elsewhere an example may use what its page has made."""
READERS_OWN = {
    "data.md": "names folders and class names that only the reader has",
    "ranks.md": "wants Ray and eight GPUs; tests/faults/test_ray.py runs the same on a CPU",
}


@dataclass(frozen=True)
class Example:
    page: str
    line: int
    section: str
    code: str


def examples(path: Path) -> list[Example]:
    """The ```python blocks of a page, each padded so that a traceback names the page's own line."""
    text, found = path.read_text(encoding="utf-8"), []
    for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        line = text[: block.start(1)].count("\n")
        headings = re.findall(r"^#+ (.+)$", text[: block.start()], flags=re.MULTILINE)
        found.append(Example(path.name, line, headings[-1] if headings else "", "\n" * line + block[1]))
    return found


PAGES = {path.name: examples(path) for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
ALL = [example for page in PAGES.values() for example in page]


@pytest.mark.parametrize("example", ALL, ids=[f"{e.page}:{e.line}:{e.section.replace(' ', '-')}" for e in ALL])
def test_example(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if example.page in READERS_OWN:
        compile(example.code, f"docs/{example.page}", "exec")
        pytest.skip(f"{example.page} {READERS_OWN[example.page]}: only its syntax was checked")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    own = PAGES[example.page]
    try:
        for each in own[own.index(example) if example.page in STAND_ALONE else 0 : own.index(example) + 1]:
            exec(compile(each.code, f"docs/{each.page}", "exec"), names)
    finally:
        ops.use("auto")


@pytest.mark.parametrize("page", ["ops.md", "drop-ins.md"])
def test_pages_of_the_parts_have_examples(page: str):
    assert PAGES[page]


def test_every_section_of_the_drop_ins_has_an_example():
    sections = re.findall(r"^## (.+)$", (ROOT / "docs" / "drop-ins.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {e.section for e in PAGES["drop-ins.md"]} == set(sections)
