"""Run the benches: `python -m benches --out DIR [--only NAME] [--quick] [--swap]`; one JSON a bench in DIR, and tables on the screen.

First the gate: every op against its definition (`check`). A backend that is wrong is timed but gets no ratio, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastkd import __version__, ops

from . import check
from ._case import Plan
from ._timing import copy_rate

BENCHES = ("bn_match", "cam", "replay", "upsample", "step")
HIDDEN = ("op", "check", "kind", "backend", "calls", "rounds", "cache", "graph_reason", "epochs", "precision", "count")
"""Columns of the JSON that the tables leave out."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches", description="Times of the ops and of the methods' steps.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for one JSON a bench")
    parser.add_argument("--only", choices=BENCHES, action="append", help="this bench only; may be given again")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: shows that everything runs, its times mean nothing")
    parser.add_argument("--swap", action="store_true", help="the providers in reverse order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile rows (default: yes, but for --quick)")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="times inside CUDA graphs too")
    args = parser.parse_args(argv)
    compiling = not args.quick if args.compile is None else args.compile
    plan = Plan(torch.device(args.device), args.quick, args.swap, compiling, args.graphs)
    args.out.mkdir(parents=True, exist_ok=True)
    if plan.cuda:
        torch.cuda.set_device(plan.device)
    about, names = facts(plan), args.only or BENCHES
    modules = {name: importlib.import_module(f"{__package__}.bench_{name}") for name in BENCHES}
    print(f"fastkd {about['fastkd']}, torch {about['torch']}, {about['device']}, {about['threads']} threads")
    gated = gate(plan, modules, names)
    plan.wrong = check.wrong(gated)
    plan.copy_gbps = about["copy_gbps"] = round(copy_rate(plan), 2)
    failed = bool(plan.wrong)
    for name in names:
        began = time.monotonic()
        record: dict[str, Any] = {"bench": name, "facts": about, "gate": gated, "rows": []}
        try:
            record["rows"] = modules[name].run(plan)
        except Exception as error:  # the other benches still run; the record says what happened
            record["error"], failed = check.one_line(error), True
        failed |= any(row.get("ok") is False and row.get("kind", "ours") == "ours" for row in record["rows"])
        record["seconds"] = round(time.monotonic() - began, 1)
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        show(name, record)
    return 1 if failed else 0


def gate(plan: Plan, modules: dict[str, Any], names: Any) -> list[dict[str, Any]]:
    """Our backends against the definitions on small inputs; a bench of steps needs all ops to be right."""
    small = dataclasses.replace(plan, quick=True, compile=False)
    wanted = [m for name, m in modules.items() if hasattr(m, "cases") and (name in names or "step" in names)]
    rows = [row for m in wanted for row in check.gate(m.cases(small))]
    for row in rows:
        if row["ok"] is False:
            print(f"WRONG  {row['op']} {row['provider']}: {row['case']}: {row['said']}")
    absent = {(row["op"], row["backend"]): row["said"] for row in rows if row["ok"] is None}
    print(f"gate: {sum(r['ok'] is True for r in rows)} right, {sum(r['ok'] is False for r in rows)} wrong, {len(absent)} backends absent")
    return rows


def facts(plan: Plan) -> dict[str, Any]:
    """What a reader needs to know of the machine and the code."""
    gpu = torch.cuda.get_device_properties(plan.device) if plan.cuda else None
    return {
        "fastkd": __version__,
        "revision": revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": {"system": platform.system(), "machine": platform.machine(), "cpu": cpu_name(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": gpu.name if gpu else "cpu",
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "tf32": torch.backends.cudnn.allow_tf32 if plan.cuda else None,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
        "settings": {"quick": plan.quick, "swap": plan.swap, "compile": plan.compile, "graphs": plan.graphs and plan.cuda},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "compiled": ops.build_info(),
        "ops": [{"op": op, "device": device, "chosen": chosen, "backends": why} for op, device, chosen, why in ops.table()],
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def revision() -> str | None:
    """The git revision of the code, with a + where files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():  # an installed copy may lie in somebody else's repository
        return None
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed.strip() else "")


def show(name: str, record: dict[str, Any]) -> None:
    """The rows as a table; those that did not run below it, with their reasons."""
    rows = [r for r in record["rows"] if "reason" not in r]
    title = f"{name}: {record['seconds']} s"
    print(f"\n{title}\n{'-' * len(title)}")
    if rows:
        keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in HIDDEN]
        table = [keys, *([cell(k, r.get(k)) for k in keys] for r in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(keys))]
        for line in table:
            print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for text in dict.fromkeys(f"{r['provider']}: {r['check']}" for r in rows if r.get("ok") is False):
        print(f"WRONG, no ratio: {text}")
    counted: dict[str, int] = {}
    for r in record["rows"]:
        if "reason" in r:
            text = f"{r.get('method') or r.get('op')}, {r['provider']}: {r['reason']}"
            counted[text] = counted.get(text, 0) + 1
    for text, times in counted.items():
        print(f"no time ({times} {'row' if times == 1 else 'rows'}): {text}")
    if "error" in record:
        print(f"stopped: {record['error']}")


def cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "ok":
        return "yes" if value else "WRONG"
    if key in ("share", "of_copy"):
        return f"{100 * value:.1f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
