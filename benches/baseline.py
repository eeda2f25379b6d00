"""Records against older ones of the same machine: what became slower than the spread of both measurements can explain."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastkd.errors import ConfigError

SAME = ("device", "settings", "torch")
"""Facts that must be equal for times to be comparable; the model of the CPU is looked at too."""
KEYS = ("op", "case", "shape", "layout", "dtype", "pass", "threads", "method", "phase", "step", "provider")


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Records by bench, of one file or of every file of a folder that holds one.

    Raises:
      ConfigError: nothing there is a record of a bench.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"'{file}' cannot be read as a record of a bench ({type(error).__name__}: {error}).") from None
        if isinstance(record, dict) and {"bench", "facts", "rows"} <= record.keys():
            found[record["bench"]] = record
    if not found:
        raise ConfigError(f"'{path}' holds no record of a bench; expected a JSON file that `fastkd bench --out DIR` wrote, or its folder.")
    return found


def comparable(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Why times taken under these facts cannot be compared; None where they can."""
    pairs = [(key, old.get(key), new.get(key)) for key in SAME] + [("cpu", old["host"]["cpu"], new["host"]["cpu"])]
    pairs.append(("freed memory kept", *(bool(about.get("memory_kept")) for about in (old, new))))
    return next((f"it was measured with {key} {a}, this is {b}" for key, a, b in pairs if a != b), None)


def slower(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Our rows whose p20 now lies above their p80 then: one sentence each."""
    before = {_key(r): r for r in _timed(old["rows"])}
    found = []
    for row in _timed(new["rows"]):
        then = before.get(_key(row))
        if then is not None and row["p20"] > then["p80"]:
            name = " ".join(str(row[k]) for k in KEYS if k in row)
            found.append(
                f"{new['bench']}: {name}: {row['ms']:.4g} ms ({row['p20']:.4g} to {row['p80']:.4g}), "
                f"was {then['ms']:.4g} ({then['p20']:.4g} to {then['p80']:.4g})"
            )
    return found


def _timed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ours that have a spread; how fast others are is not our regression."""
    return [r for r in rows if "p20" in r and r.get("kind", "ours") == "ours" and not r["provider"].startswith("definition")]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in KEYS)
