"""The fault table: what is done to a run, what must follow, and how often it did.

A test stands for a fault by `@pytest.mark.fault("T9")`, wherever it lies; each of its cases is a try, and one that makes several
says so with the fixture `tries`. `--fault-table docs/reliability.md` writes what a session saw into that page, and into a record
beside it; faults that the session did not meet keep what was recorded before.
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

BEGIN, END = "<!-- faults: written by pytest --fault-table -->", "<!-- end of faults -->"


class Fault(NamedTuple):
    """What is done, what must follow; and what no test here shows, with what would show it."""

    done: str
    follows: str
    open: str = ""


FAULTS = {n: Fault(**row) for n, row in tomllib.loads((Path(__file__).parent / "faults.toml").read_text(encoding="utf-8")).items()}
"""By its number in the project's list of faults."""


def rendered(record: dict[str, Any]) -> str:
    """The table in Markdown: a row a fault, with what was recorded of it."""
    columns = ("", "what is done", "what must follow", "tries", "survived", "lost", "what no test here shows, and what would")
    lines = [BEGIN, "", f"| {' | '.join(columns)} |", "|---|---|---|--:|--:|--:|---|"]
    for name, fault in FAULTS.items():
        seen = record["faults"].get(name)
        counts = [seen["tries"], seen["survived"], seen["tries"] - seen["survived"]] if seen else ["–"] * 3
        missing = fault.open or ("" if seen else "not run yet")
        lines.append(f"| {name} | {fault.done} | {fault.follows} | {' | '.join(map(str, counts))} | {missing} |")
    where = f"Written on {record['date']} with Python {record['python']}, torch {record['torch']}, {record['cores']} cores, no GPU."
    return "\n".join([*lines, "", where, "", END])


def replaced(page: str, record: dict[str, Any]) -> str:
    """A page with its table as the record has it."""
    head, _, rest = page.partition(BEGIN)
    return head + rendered(record) + rest.partition(END)[2]


class Session:
    """Counts the tries of a test session and writes them down at its end."""

    def __init__(self, page: Path):
        self.page = page
        self.faults: dict[str, dict[str, int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when != "call" and report.passed):
            return
        said = dict(report.user_properties)
        tries = said.get("tries", 1)
        survived = said.get("survived", tries) if report.passed else min(said.get("survived", 0), tries - 1)
        for name in said.get("faults", ()):
            seen = self.faults.setdefault(name, {"tries": 0, "survived": 0})
            seen["tries"] += tries
            seen["survived"] += survived

    def pytest_sessionfinish(self) -> None:
        path = self.page.with_suffix(".json")
        before = json.loads(path.read_text(encoding="utf-8"))["faults"] if path.exists() else {}
        faults = {name: {**before, **self.faults}[name] for name in FAULTS if name in before or name in self.faults}
        record = {
            "date": datetime.date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
            "cores": os.cpu_count(), "faults": faults,
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
