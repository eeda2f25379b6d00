"""The fault table: every fault has a row, every row a test or a reason, and the page is what the record says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.faults import table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def marked() -> set[str]:
    """Faults that some test stands for."""
    files = (p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__))
    return {name for text in files for call in re.findall(r"mark\.fault\(([^)]*)\)", text) for name in re.findall(r'"(T\d+)"', call)}


def test_every_fault_has_a_row_and_every_row_a_test_or_a_reason():
    assert list(table.FAULTS) == [f"T{n}" for n in range(1, 34)]
    found = marked()
    assert found <= table.FAULTS.keys()
    assert not [name for name, fault in table.FAULTS.items() if name not in found and not fault.open]


def test_the_page_is_what_the_record_says():
    record = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert page == table.replaced(page, record), "write it anew: make faults ARGS='--fault-table docs/reliability.md'"
    assert all(seen["tries"] == seen["survived"] > 0 for seen in record["faults"].values()), "the record has losses"


def report(outcome: str, when: str = "call", **said: object) -> pytest.TestReport:
    return pytest.TestReport("a", ("a", 1, "a"), {}, outcome, None, when, user_properties=list(said.items()))  # type: ignore[arg-type]


def test_tries_are_counted_and_earlier_faults_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nstale\n{table.END}\nafter\n")
    page.with_suffix(".json").write_text(json.dumps({"faults": {"T1": {"tries": 9, "survived": 9}, "T7": {"tries": 3, "survived": 3}}}))
    session = table.Session(page)
    for said in (
        report("passed", faults=["T7", "T8"]),
        report("passed", faults=["T7"], tries=20, survived=20),
        report("failed", faults=["T8"]),
        report("failed", faults=["T33"], tries=10, survived=10),  # all were survived, and then something else was wrong
        report("failed", "setup", faults=["T2"]),
        report("passed", "setup", faults=["T2"]),
        report("skipped", faults=["T2"]),
        report("passed"),
    ):
        session.pytest_runtest_logreport(said)
    session.pytest_sessionfinish()
    faults = json.loads(page.with_suffix(".json").read_text())["faults"]
    assert {k: (v["tries"], v["survived"]) for k, v in faults.items()} == {
        "T1": (9, 9), "T2": (1, 0), "T7": (21, 21), "T8": (2, 1), "T33": (10, 9),
    }  # fmt: skip
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| 21 | 21 | 0 |" in text and "| 2 | 1 | 1 |" in text and "| – | – | – | not run yet |" in text


@pytest.mark.parametrize(("asked", "expected"), [("faults", True), ("faults or soak", True), ("not slow and not faults", False)])
def test_quick_tests_of_faults_run_with_the_others(asked, expected):
    items = [Item(["fault"]), Item([]), Item(["fault", "soak"])]
    table.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: asked), items)
    assert [("faults" in i.added) for i in items] == [expected, False, False]
    assert [dict(i.user_properties).get("faults") for i in items] == [["T9"], None, ["T9"]]


class Item:
    """As much of a test as the hook looks at."""

    def __init__(self, marks: list[str]):
        self.marks, self.added = marks, []  # type: list[str], list[str]
        self.user_properties: list[tuple[str, object]] = []

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        return [pytest.mark.fault("T9").mark] if name in self.marks else []

    def get_closest_marker(self, name: str) -> bool | None:
        return True if name in self.marks else None

    def add_marker(self, name: str) -> None:
        self.added.append(name)
