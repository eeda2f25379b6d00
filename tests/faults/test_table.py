"""The fault table: every fault has a row, every row a test or a reason, and the page is what the record says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.faults import table

PAGE = table.ROOT / "docs" / "reliability.md"


def marked() -> set[str]:
    """Faults that some test stands for."""
    files = (p.read_text(encoding="utf-8") for p in (table.ROOT / "tests").rglob("test_*.py") if p != Path(__file__))
    return {name for text in files for call in re.findall(r"mark\.fault\(([^)]*)\)", text) for name in re.findall(r'"(T\d+)"', call)}


def test_every_fault_has_a_row_and_every_row_a_test_or_a_reason():
    assert list(table.FAULTS) == [f"T{n}" for n in range(1, 34)]
    found = marked()
    assert found <= table.FAULTS.keys()
    assert not [name for name, fault in table.FAULTS.items() if name not in found and not fault.open]


def test_the_page_is_what_the_record_says():
    record = json.loads(PAGE.with_suffix(".json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    assert page == table.replaced(page, record), "write it anew: make faults ARGS='--fault-table=docs/reliability.md'"
    assert all(tries == survived > 0 for tries, survived in table.sums(record).values()), "the record has losses"


def report(outcome: str, name: str, *faults: str, when: str = "call", **said: object) -> pytest.TestReport:
    properties = [*said.items(), *([("faults", list(faults))] if faults else [])]
    return pytest.TestReport(name, ("a", 1, "a"), {}, outcome, None, when, user_properties=properties)  # type: ignore[arg-type]


def test_tries_are_counted_and_earlier_ones_kept(tmp_path):
    page, here = tmp_path / "page.md", "tests/faults/test_table.py::test_tries_are_counted_and_earlier_ones_kept"
    page.write_text(f"before\n{table.BEGIN}\nstale\n{table.END}\nafter\n")
    nine, three = ({"faults": ["T1"], "tries": n, "survived": n} for n in (9, 3))
    page.with_suffix(".json").write_text(json.dumps({"tests": {here: nine, "tests/gone.py::test_x": three, "a::b": three}}))
    session = table.Session(page)
    for said in (
        report("passed", "a::b[x]", "T7", "T8"),
        report("passed", "a::b[y]", "T7", "T8"),
        report("passed", "a::c", "T7", tries=20, survived=20),
        report("failed", "a::d", "T8"),
        report("failed", "a::e", "T33", tries=10, survived=10),  # all were survived, and then something else was wrong
        report("failed", "a::f", "T2", when="setup"),
        report("passed", "a::g", "T2", when="setup"),
        report("skipped", "a::g", "T2"),
        report("passed", "a::h"),
    ):
        session.pytest_runtest_logreport(said)
    session.pytest_sessionfinish()
    record = json.loads(page.with_suffix(".json").read_text())
    assert table.sums(record) == {"T1": (9, 9), "T2": (1, 0), "T7": (22, 22), "T8": (3, 2), "T33": (10, 9)}
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| 22 | 22 | 0 |" in text and "| 3 | 2 | 1 |" in text and "| – | – | – | not run yet |" in text


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
