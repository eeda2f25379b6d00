"""Targets beside measured rows: met, short, or not run and why. Reads records only, so that a committed file can be judged again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .targets import MACHINE, Target

Row = dict[str, Any]
LABELS = ("op", "case", "shape", "layout", "dtype", "pass")
"""Columns that say what was computed: rows that agree in them are of one case."""
ORDER = ("wrong", "short", "not run", "not gated", "met")


@dataclass(frozen=True)
class Verdict:
    """`status` is one of `ORDER`; `text` is the cell of the table; `ms` is the time of ours in the worst case, where it has one."""

    status: str
    text: str
    ms: float | None = None


@dataclass(frozen=True)
class _Found:
    """One case: the ratio (or share), or why there is none."""

    status: str
    value: float | None = None
    reason: str = ""
    ms: float | None = None


def judge(target: Target, record: dict[str, Any] | None, threads: int | None = None) -> Verdict:
    """A target against the record of its bench, under one thread count (None: rows without one)."""
    if record is None:
        return Verdict("not run", f"not run: no record of the bench {target.bench}")
    found = [_case(target, group, record["facts"]) for group in _groups(target, record["rows"], threads)]
    if not found:
        why = record.get("skipped") or record.get("error") or f"the bench {target.bench} has no such row"
        return Verdict("not run", f"not run: {why}")
    worst = min(found, key=lambda f: (ORDER.index(f.status), f.value or 0.0))
    values = sorted(f.value for f in found if f.value is not None)
    measured = _span(target, values)
    if worst.status == "wrong":
        return Verdict("wrong", f"wrong: {worst.reason}")
    if target.needs and target.needs not in record["facts"].get("flags", ()):
        return Verdict("not gated", f"not gated: {MACHINE[target.needs]}" + (f"; measured {measured}" if measured else ""), worst.ms)
    if not values:
        return Verdict("not run", f"not run: {worst.reason}")
    absent = [f.reason for f in found if f.status == "not run"]
    tail = f" ({len(absent)} of {len(found)} cases not run: {absent[0]})" if absent else ""
    tail += "".join(f" ({reason})" for reason in dict.fromkeys(f.reason for f in found if f.reason and f.status in ("met", "short")))
    if worst.status == "short":
        tail = f" of {f'{target.least:g}x' if target.rivals else f'{100 * target.least:.0f} %'}{tail}"
        return Verdict("short", f"short: {measured}{tail}" + (f": {target.missed}" if target.missed else ""), worst.ms)
    return Verdict("met", f"met: {measured}{tail}", max(f.ms or 0.0 for f in found))


def _span(target: Target, values: list[float]) -> str:
    """The worst value and the best."""
    if not values:
        return ""

    def one(value: float) -> str:
        return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"

    if not target.rivals:
        low, high = (f"{100 * v:.0f} %" for v in (values[0], values[-1]))
    else:
        low, high = one(values[0]), one(values[-1])
    return low if low == high else f"{low} to {high}"


def _groups(target: Target, rows: Iterable[Row], threads: int | None) -> list[list[Row]]:
    """The rows of each case that the target is about. A row that differs only in a label of `across` is a rival of the same case."""
    keys = [k for k in LABELS if k not in target.across]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("threads") in (threads, None) and all(fnmatchcase(str(row.get(k, "")), v) for k, v in target.where.items()):
            groups.setdefault(tuple(row.get(k) for k in keys), []).append(row)
    return list(groups.values())


def _case(target: Target, rows: list[Row], facts: dict[str, Any]) -> _Found:
    own = _own(target, rows, facts)
    if own is None:
        return _Found("not run", reason=f"no row '{target.ours or 'ours'}'")
    if "ms" not in own:
        return _Found("not run", reason=str(own.get("reason", "no time")))
    if own.get("ok") is False:
        return _Found("wrong", reason=str(own.get("check", "")))
    if not target.rivals:
        share = own.get("graph_of_copy", own.get("of_copy")) if target.graph else own.get("of_copy")
        if share is None:
            return _Found("not run", reason="no byte count for this case")
        return _Found("met" if share >= target.least else "short", share, ms=own["ms"])
    named = [r for r in rows if r.get("kind") in target.rivals or any(fnmatchcase(r["provider"], p) for p in target.rivals)]
    timed = [r for r in named if "ms" in r and r.get("ok") is not False]
    if not timed:
        why = next((r.get("reason") or r.get("check") for r in named), None)
        return _Found("not run", reason=str(why or f"no row '{target.rivals[0]}'"), ms=own["ms"])
    ms = "graph_ms" if target.graph else "ms"
    if target.graph and ("graph_ms" not in own or not any("graph_ms" in r for r in timed)):
        return _Found("not run", reason="no time from a graph", ms=own["ms"])
    left = [str(r["provider"]) for r in timed if ms not in r]
    timed = [r for r in timed if ms in r]
    rival = min(timed, key=lambda r: r[ms])
    theirs = rival[ms]
    if target.less:
        base = next((r for r in rows if r["provider"] == target.less and "ms" in r), None)
        if base is None:
            return _Found("not run", reason=f"no row '{target.less}'", ms=own["ms"])
        theirs -= base[ms]
    value = theirs / own[ms]
    met = value >= target.least or (target.even and own["p20"] <= rival["p80"])
    return _Found("met" if met else "short", value, reason=f"{', '.join(left)} not replayed" if left else "", ms=own["ms"])


def _own(target: Target, rows: list[Row], facts: dict[str, Any]) -> Row | None:
    """The row that is held to the target: the named provider, or the backend that the op chooses by itself, called or in a graph."""
    if target.ours:
        return next((r for r in rows if fnmatchcase(r["provider"], target.ours)), None)
    ours = [r for r in rows if r.get("kind") == "ours" and r["provider"].startswith("ours")]
    own = [o for o in facts.get("ops", ()) if o["device"] == facts.get("type", "cpu")]
    chosen = {o["op"]: f"ours: {o.get('captured', o['chosen']) if target.graph else o['chosen']}" for o in own}
    taken = [r for r in ours if r["provider"] == chosen.get(r.get("op", ""))]
    quick = [r for r in taken or ours if "ms" in r]
    return min(quick, key=lambda r: r["ms"]) if quick else next(iter(taken or ours), None)


def table(targets: Iterable[Target], records: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]], list[Verdict]]:
    """The table of targets: its head, its lines, and the verdicts in it.

    With two thread counts there is a column for each, and one for how much faster ours is with the larger: below 1x two threads
    lose what one has won.
    """
    counts = sorted({r["threads"] for record in records.values() for r in record["rows"] if r.get("threads")})
    head = ["row", "against", "target", *([f"{n} thread{'s' if n > 1 else ''}" for n in counts] or ["measured"])]
    head += ["ours, more threads"] if len(counts) > 1 else []
    lines, all_found = [], []
    for t in targets:
        found = [judge(t, records.get(t.bench), n) for n in counts or [None]]
        gain = [f"{found[0].ms / found[-1].ms:.2f}x" if found[0].ms and found[-1].ms else ""] if len(counts) > 1 else []
        lines.append([t.row, t.against, t.wanted, *(v.text for v in found), *gain])
        all_found += found
    return head, lines, all_found
