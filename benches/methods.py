"""Every registered method on the embedded digits teacher, each for the same CPU time:
`python -m benches.methods --out DIR [--seconds 60] [--only NAME]`.

A method runs its digits recipe, with epochs (and what is counted in epochs) shrunk or stretched so that they fill the budget; a probe of
two epochs says what one costs. Prints a table, writes DIR/methods.json and DIR/methods.svg.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastkd import methods
from fastkd.config import read_recipe, recipes

from . import _budget, curve
from .facts import cpuinfo, revision
from .tables import aligned

IN_EPOCHS = ("milestones",)
"""Fields of recipes that count epochs, beside `epochs` and `warmup`."""


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    kept = older(options)
    for name in options.only or methods.names():
        try:
            kept[name] = measure(name, options)
        except _budget.BenchError as error:
            kept[name] = {"method": name, "reason": str(error)}
        print(line(kept[name]), flush=True)
        _budget.write(options.out / "methods.json", record(list(kept.values()), options))
    rows = list(kept.values())
    print("\n".join(["", *table(rows)]))
    drawn = [r for r in rows if "top1" in r]
    if drawn:
        (options.out / "methods.svg").write_text(picture(drawn), encoding="utf-8")
    return 0 if drawn else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches.methods", description="All methods on the digits teacher with equal budgets.")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for methods.json, methods.svg and the run folders")
    made.add_argument("--seconds", type=float, default=60.0, metavar="S", help="CPU seconds (user + system) of each run")
    made.add_argument("--only", choices=methods.names(), action="append", default=[], help="this method only; may be given again")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the record")
    return made


def older(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows of the record in --out by method, where it was made with the same budget, threads and seed: a run adds to it."""
    same = {"budget": options.seconds, "threads": options.threads, "seed": options.seed}
    return {row["method"]: row for row in _budget.older(options.out / "methods.json", **same).get("rows", [])}


def settings(name: str) -> dict[str, Any]:
    """What the digits recipe of a method sets, its `epochs` and `warmup` filled in from the method's defaults.

    Raises:
      BenchError: there is none.
    """
    if f"{name}-digits" not in recipes():
        raise _budget.BenchError(f"there is no recipe {name}-digits")
    table = read_recipe(f"{name}-digits")["method"]
    fields = {f.name: f.default for f in dataclasses.fields(methods.method_class(name, table))}
    return {**{k: fields[k] for k in ("epochs", "warmup") if k in fields}, **table}


def words(name: str, options: argparse.Namespace, epochs: int, warmup: int) -> list[str]:
    """The words of `fastkd run`, but for --out: the recipe with another number of epochs."""
    own = settings(name)
    over: dict[str, Any] = {"epochs": epochs} | ({"warmup": warmup} if "warmup" in own else {})
    over |= {k: [max(1, round(v * epochs / own["epochs"])) for v in own[k]] for k in IN_EPOCHS if k in own}
    given = ["--recipe", f"{name}-digits", "--seed", str(options.seed), "--device", "cpu"]
    for key, value in over.items():
        given += ["--set", f"method.{key}={value}"]
    return given


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    own = settings(name)
    out = options.out / "runs" / f"{name}-{time.strftime('%H%M%S')}"
    warmup = own.get("warmup", 0) / own["epochs"]
    probe = out.with_name(f"{out.name}-probe")
    plan = _budget.plan(lambda e, w: words(name, options, e, w), probe, options.seconds, warmup, options.threads)
    command = words(name, options, plan["epochs"], plan["warmup"])
    spent = _budget.spend(command, out, options.seconds, options.threads)
    points = spent.top1()
    if spent.code not in (0, 75) or not points:
        raise _budget.BenchError(f"the run ended with code {spent.code}: {spent.said.strip()[-400:]}")
    return {
        "method": name,
        "command": "fastkd run " + " ".join(command),
        "data": "data" in methods.method_class(name, own).needs,
        "commit": revision(),
        "code": spent.code,
        "cpu_seconds": round(spent.seconds, 1),
        "evaluation_seconds": round(spent.evaluation, 1),
        "plan": plan,
        "epochs": len(spent.points),
        "teacher": spent.teacher,
        "top1": points[-1][1],
        "best": max(top1 for _, top1 in points),
        "seconds_top1": points,
    }


def record(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": "top-1 (%) on 500 test digits against CPU seconds (user + system) of the process, import and teacher included",
        "cpu": cpuinfo("model name"),
        "torch": torch.__version__,
        "threads": options.threads,
        "seed": options.seed,
        "load": options.load,
        "budget": options.seconds,
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{row['method']}: not run: {row['reason']}"
    return f"{row['method']}: {row['top1']} % after {row['cpu_seconds']} CPU seconds, {row['epochs']} epochs"


def at(row: dict[str, Any], seconds: float) -> float | None:
    """Accuracy of the last evaluation before `seconds`; None before the first."""
    before = [top1 for s, top1 in row["seconds_top1"] if s <= seconds]
    return before[-1] if before else None


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a result, the best last epoch first."""
    return sorted((r for r in rows if "top1" in r), key=lambda r: -r["top1"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    body = [[r["method"], f"{r['top1']:.2f}", f"{r['best']:.2f}", str(r["epochs"]), f"{r['cpu_seconds']:.1f}"] for r in ranked(rows)]
    return aligned([["method", "top-1 %", "best", "epochs", "CPU s"], *body]) + [line(r) for r in rows if "reason" in r]


def picture(rows: list[dict[str, Any]]) -> str:
    records = [{**r, "name": r["method"]} for r in ranked(rows)]
    return curve.draw(records, "seconds_top1", "CPU seconds", beside=True)


if __name__ == "__main__":
    sys.exit(main())
