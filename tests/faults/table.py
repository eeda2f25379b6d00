"""The fault table: what is done to a run, what must follow, and how often it did.

A test stands for a fault by `@pytest.mark.fault("T9")`, wherever it lies; each of its cases is a try, and one that makes several
says so with the fixture `tries`. `--fault-table=docs/reliability.md` writes what a session saw into a record beside that page, in which
tests that the session did not run keep what they had, and the sums of the record into the page.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- faults: written by pytest --fault-table -->", "<!-- end of faults -->"


class Fault(NamedTuple):
    """What is done, what must follow; and what no test here shows, with what would show it."""

    done: str
    follows: str
    open: str = ""


FAULTS = {n: Fault(**row) for n, row in tomllib.loads((Path(__file__).parent / "faults.toml").read_text(encoding="utf-8")).items()}
"""By its number in `faults.toml`."""


def sums(record: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(tries, survived) of each fault that was met."""
    found: dict[str, tuple[int, int]] = {}
    for seen in record["tests"].values():
        for name in seen["faults"]:
            tries, survived = found.get(name, (0, 0))
            found[name] = tries + seen["tries"], survived + seen["survived"]
    return found


def rendered(record: dict[str, Any]) -> str:
    """The table in Markdown: a row a fault, with what was recorded of it."""
    columns = ("", "what is done", "what must follow", "tries", "survived", "lost", "what no test here shows, and what would")
    lines = [BEGIN, "", f"| {' | '.join(columns)} |", "|---|---|---|--:|--:|--:|---|"]
    found = sums(record)
    for name, fault in FAULTS.items():
        tries, survived = found.get(name, (0, 0))
        counts = (tries, survived, tries - survived) if tries else ("–", "–", "–")
        missing = fault.open or ("" if tries else "not run yet")
        lines.append(f"| {name} | {fault.done} | {fault.follows} | {' | '.join(map(str, counts))} | {missing} |")
    where = f"Written on {record['date']} with Python {record['python']}, torch {record['torch']}, {record['cores']} cores, no GPU."
    return "\n".join([*lines, "", where, "", END])


def replaced(page: str, record: dict[str, Any]) -> str:
    """A page with its table as the record has it."""
    head, _, rest = page.partition(BEGIN)
    return head + rendered(record) + rest.partition(END)[2]


def there(test: str) -> bool:
    """Whether a recorded test still is: `tests/faults/test_soak.py::test_…`."""
    file, _, name = test.partition("::")
    path = ROOT / file
    return path.is_file() and f"def {name}(" in path.read_text(encoding="utf-8")


class Session:
    """Counts the tries of a test session and writes them down at its end."""

    def __init__(self, page: Path):
        self.page = page
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = dict(report.user_properties)
        if "faults" not in said or report.skipped or (report.when != "call" and report.passed):
            return
        tries = said.get("tries", 1)
        survived = said.get("survived", tries) if report.passed else min(said.get("survived", 0), tries - 1)
        seen = self.tests.setdefault(report.nodeid.partition("[")[0], {"faults": said["faults"], "tries": 0, "survived": 0})
        seen["tries"] += tries
        seen["survived"] += survived

    def pytest_sessionfinish(self) -> None:
        path = self.page.with_suffix(".json")
        before = json.loads(path.read_text(encoding="utf-8"))["tests"] if path.exists() else {}
        tests = {name: seen for name, seen in sorted({**before, **self.tests}.items()) if name in self.tests or there(name)}
        record = {
            "date": datetime.date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
            "cores": os.cpu_count(), "tests": tests,
        }  # fmt: skip
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        self.page.write_text(replaced(self.page.read_text(encoding="utf-8"), record), encoding="utf-8")


# Hooks, which tests/conftest.py hands to pytest ---------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE.md", help="write what tests of faults found into this page and FILE.json beside it")


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--fault-table")
    if page and not hasattr(config, "workerinput"):  # with xdist, the controller sees all reports
        config.pluginmanager.register(Session(Path(page)), "fault-table")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m faults` runs the quick tests of faults as well, which the default suite has too."""
    asked = "not faults" not in config.getoption("-m")
    for item in items:
        names = [name for mark in item.iter_markers("fault") for name in mark.args]
        if names:
            item.user_properties.append(("faults", names))
            if asked and item.get_closest_marker("soak") is None:
                item.add_marker("faults")
