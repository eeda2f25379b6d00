"""Rows as text: the table of a bench, and the table of targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HIDDEN = ("op", "check", "kind", "backend", "calls", "rounds", "cache", "graph_reason", "epochs", "precision", "count")
"""Columns of a record that the tables leave out."""


def bench_lines(name: str, record: dict[str, Any]) -> list[str]:
    """The rows of a record as a table; those that did not run below it, with their reasons."""
    rows = [r for r in record["rows"] if "reason" not in r]
    title = f"{name}: {record['seconds']} s"
    lines = ["", title, "-" * len(title)]
    if rows:
        keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in HIDDEN]
        lines += aligned([keys, *([cell(k, r.get(k)) for k in keys] for r in rows)])
    lines += dict.fromkeys(f"WRONG, no ratio: {r['provider']}: {r['check']}" for r in rows if r.get("ok") is False)
    lines += [f"no time ({times} {'row' if times == 1 else 'rows'}): {text}" for text, times in reasons(record["rows"]).items()]
    lines += [f"{word}: {record[key]}" for key, word in (("error", "stopped"), ("skipped", "skipped")) if record.get(key)]
    return lines


def reasons(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Why rows have no time, and how many have none for that reason."""
    counted: dict[str, int] = {}
    for r in rows:
        if "reason" in r:
            text = f"{r.get('method') or r.get('op')}, {r['provider']}: {r['reason']}"
            counted[text] = counted.get(text, 0) + 1
    return counted


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Cells under each other."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in table]


def cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "ok":
        return "yes" if value else "WRONG"
    if key in ("share", "of_copy", "graph_of_copy", "collectives"):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
