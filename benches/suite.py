"""A run of the benches, behind both front ends: gate, benches one after the other, their records, the table of targets.

First the gate: every op against its definition (`check`). A backend that is wrong is timed but gets no ratio, and the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkd.assemble.device import resolve_device
from fastkd.engine import allocator
from fastkd.errors import ConfigError, unknown

from . import BENCHES, baseline, check, tables, targets, verdicts
from ._case import Plan
from ._timing import copy_rate
from .facts import facts

WRONG, SLOWER, LOST = 1, 8, 9
"""Exit codes: an op is wrong or a bench broke; slower than the baseline; a kernel broke the GPU context, so nothing more was measured."""
LEAST_SECONDS = 5
"""With less than this left of a budget, no further bench begins."""
SHARES = {"bn_match": 52, "upsample": 34, "generator": 26, "engine": 40, "replay": 24, "cam": 22, "step": 12}
"""How a budget is divided: a bench gets its share of what the earlier ones left over."""


@dataclass(frozen=True)
class Request:
    """What the options of the front ends say.

    Attributes:
      out: folder for one JSON a bench; None: none is written. only: these benches; () all.
      device, compile, threads: None: a GPU where there is one; not for `quick`; one and all cores on a CPU.
      seconds: budget of the whole run. baseline: older record, or a folder of them, to compare with. without: backends to leave out.
    """

    out: Path | None = None
    only: tuple[str, ...] = ()
    quick: bool = False
    swap: bool = False
    device: str | None = None
    compile: bool | None = None
    graphs: bool = True
    threads: tuple[int, ...] | None = None
    seconds: float | None = None
    baseline: Path | None = None
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Records by bench, the table of targets, sentences on what became slower, and the exit code."""

    records: dict[str, dict[str, Any]]
    head: list[str]
    lines: list[list[str]]
    slower: list[str]
    code: int


def run(request: Request, say: Callable[[str], None] = print) -> Result:
    """Run the benches that are asked for; `say` is given each line of what is shown.

    Raises:
      ConfigError: an unknown bench, thread count or baseline. PlaceError: a device that is not there.
    """
    plan, names = plan_of(request), wanted(request.only)
    with allocator.kept(plan.device) as kept:  # as in a run, and for every provider
        return _run(request, plan, names, kept, say)


def _run(request: Request, plan: Plan, names: list[str], kept: bool, say: Callable[[str], None]) -> Result:
    older = baseline.load(request.baseline) if request.baseline is not None else {}
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
    if plan.cuda:
        torch.cuda.set_device(plan.device)
    about = facts(plan) | {"memory_kept": kept}
    for name in set(older) & set(names):
        if why := baseline.comparable(older[name]["facts"], about):
            raise ConfigError(f"the baseline of {name} cannot be compared: {why}; measure it again on this machine.")
    modules = {name: module_of(name) for name in BENCHES}
    say(f"fastkd {about['fastkd']}, torch {about['torch']}, {about['host']['cpu'] if not plan.cuda else about['device']}, "
        f"threads: {about['threads']}")  # fmt: skip
    plan.copy_gbps = about["copy_gbps"] = round(copy_rate(plan), 2)
    records: dict[str, dict[str, Any]] = {}
    lost = ""
    try:
        gated = gate(plan, modules, names, say)
    except check.DeviceLost as error:
        gated, lost = [], f"the gate broke the GPU context: {error}"
        say(f"WRONG  {lost}")
    plan.wrong = check.wrong(gated)
    for i, name in enumerate(names):
        own = dataclasses.replace(plan, deadline=share(plan.deadline, names[i:]))
        records[name] = bench(name, modules[name], own, about, gated, request.out, lost)
        lost = records[name].get("lost", "")
        for line in tables.bench_lines(name, records[name]):
            say(line)
    held = [t for t in targets.of(plan.device.type) if t.bench in records]
    head, lines, found = verdicts.table(held, records)
    title = "targets" + (": toy sizes, nothing here can be met or short in earnest" if plan.quick else "")
    for line in ("", title, "-" * len(title), *tables.aligned([head, *lines])):
        say(line)
    behind = compare(older, records, say)
    broken = bool(plan.wrong) or any("error" in r or wrong_rows(r) for r in records.values()) or any(v.status == "wrong" for v in found)
    return Result(records, head, lines, behind, LOST if lost else WRONG if broken else SLOWER if behind else 0)


def share(deadline: float | None, names: Sequence[str]) -> float | None:
    """When the first of the benches that are still to run has to end, so that the others have their shares."""
    if deadline is None:
        return None
    now = time.monotonic()
    return now + (deadline - now) * SHARES[names[0]] / sum(SHARES[n] for n in names)


def module_of(name: str) -> Any:
    """A bench: `run(plan)` gives its rows; `cases(plan)`, where it has them, is what the gate looks at."""
    return importlib.import_module(f"{__package__}.bench_{name}")


def plan_of(request: Request) -> Plan:
    """The plan of a request on this machine."""
    device = resolve_device(request.device or "auto")
    counts = request.threads
    if counts is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        counts = (1,) if request.quick else tuple(dict.fromkeys((1, cores)))
    if any(n < 1 for n in counts):
        raise ConfigError(f"--threads has {min(counts)}; expected thread counts of at least 1.")
    compiling = not request.quick if request.compile is None else request.compile
    deadline = None if request.seconds is None else time.monotonic() + request.seconds
    graphs = request.graphs and not request.quick
    counts = () if device.type == "cuda" else counts
    return Plan(device, request.quick, request.swap, compiling, graphs, counts, without=request.without, deadline=deadline)


def wanted(only: Sequence[str]) -> list[str]:
    """The benches that are asked for, in the order in which they run."""
    for name in only:
        if name not in BENCHES:
            raise ConfigError(unknown("bench", name, BENCHES))
    return [name for name in BENCHES if not only or name in only]


def bench(
    name: str, module: Any, plan: Plan, about: dict[str, Any], gated: list[dict[str, Any]], out: Path | None, lost: str = ""
) -> dict[str, Any]:
    """Run one bench. Its record is on disk after every case, so that what is measured stays if the run is cut off.

    `lost` says why there is no GPU any more; the record of a bench that loses it has the field too.
    """
    began = time.monotonic()
    record: dict[str, Any] = {"bench": name, "complete": False, "seconds": 0.0, "facts": about, "gate": gated, "rows": []}

    def keep(rows: list[dict[str, Any]]) -> None:
        record["rows"], record["seconds"] = rows, round(time.monotonic() - began, 1)
        if out is not None:
            write(out / f"{name}.json", record)

    if lost:
        record["error"] = record["lost"] = lost
        keep([])
        return record
    if plan.deadline is not None and plan.deadline - began < LEAST_SECONDS:
        record["skipped"] = "no time was left for it"
        keep([])
        return record
    try:
        rows = module.run(dataclasses.replace(plan, progress=keep))
        record["complete"] = not plan.late
        keep(rows)
    except check.DeviceLost as error:
        record["error"] = record["lost"] = f"the bench {name} broke the GPU context: {error}"
        keep(record["rows"])
    except Exception as error:  # the other benches still run; the record says what happened
        record["error"] = check.one_line(error)
        keep(record["rows"])
    return record


def write(path: Path, record: dict[str, Any]) -> None:
    """The file is the old one or the new one at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def gate(plan: Plan, modules: dict[str, Any], names: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Our backends against the definitions on small inputs; a bench of steps needs all ops to be right."""
    small = dataclasses.replace(plan, quick=True, compile=False)
    needed = [m for name, m in modules.items() if hasattr(m, "cases") and (name in names or {"step", "engine"} & set(names))]
    rows = [row for m in needed for row in check.gate(m.cases(small))]
    for row in rows:
        if row["ok"] is False:
            say(f"WRONG  {row['op']} {row['provider']}: {row['case']}: {row['said']}")
    absent = {(row["op"], row["backend"]): row["said"] for row in rows if row["ok"] is None}
    say(f"gate: {sum(r['ok'] is True for r in rows)} right, {sum(r['ok'] is False for r in rows)} wrong, {len(absent)} backends absent")
    return rows


def wrong_rows(record: dict[str, Any]) -> bool:
    return any(row.get("ok") is False and row.get("kind", "ours") == "ours" for row in record["rows"])


def compare(older: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]], say: Callable[[str], None]) -> list[str]:
    """What became slower than in the older records."""
    found = [sentence for name, old in older.items() if name in records for sentence in baseline.slower(old, records[name])]
    if older:
        said = f"baseline: {len(found)} of our rows are slower than the spread of both measurements explains"
        for line in ("", *(f"slower: {sentence}" for sentence in found), said):
            say(line)
    return found
