"""What a method that ships with fastkd has beside its file and its line: a row in README's table, and an example of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastkd import config, methods

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_table_of_the_readme_has_every_method() -> None:
    _, _, section = README.partition("## Methods, and how faithful they are")
    rows = re.findall(r"^\| `(\w+)` \|", section.partition("\n## ")[0], flags=re.MULTILINE)
    assert len(rows) == len(set(rows)) and set(rows) == set(methods.names()), "a method that ships has a row in README.md"


@pytest.mark.parametrize("name", methods.names())
def test_it_runs_without_a_teacher_of_ones_own(name: str) -> None:
    recipe = f"{name}-digits"
    assert recipe in config.recipes(), f"a method that ships has an embedded example: fastkd/recipes/{recipe}.toml"
    assert config.resolve(None, {"method": name}).method["name"] == name
