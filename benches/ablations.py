"""Whether switching a part of a method off changes the student as its paper reports: `python -m benches.ablations --out DIR [--seeds 2]`.

Each host runs a short form of its digits recipe as it is and with one switch, with the same steps and seeds; the difference in top-1 of
the last epoch is what the part is worth here.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastkd import methods

from . import _budget
from .facts import cpuinfo, revision
from .tables import aligned


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A part of `method` that `switch` takes away; `claim`: what the paper says that it does to the student."""

    part: str
    method: str
    switch: tuple[str, ...]
    claim: str = "lower accuracy"


ABLATIONS = (
    Ablation("BN-statistics term", "fast", ("bn=0",)),
    Ablation("adversarial term", "fast", ("adv=0",)),
    Ablation("noisy layer drawn anew every loop", "nayer", ("redraw_noise=false",)),
    Ablation("CAM term", "muse", ("a_cam=0",)),
    Ablation("prioritised replay", "ssd", ("sampler=uniform",)),
)
SHORT: dict[str, tuple[str, ...]] = {
    "fast": ("epochs=7", "warmup=1"),
    "nayer": ("epochs=5", "warmup=1"),
    "muse": ("epochs=5", "warmup=1"),
    "ssd": ("epochs=7", "warmup=1"),
}
"""The recipes cut to a minute or less of one core, before the student is so good that nothing matters."""
LIMIT = 600.0
"""CPU seconds after which a run is given up."""


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    runs = older(options)
    for seed in range(options.seeds):
        for own in wanted(options):
            for switch in ((), own.switch):
                key = (own.method, switch, seed)
                if key not in runs:
                    runs[key] = run(own.method, switch, seed, options)
                    print(f"{own.method} {' '.join(switch) or 'as it is'}, seed {seed}: {runs[key]['top1']} %", flush=True)
                    _budget.write(options.out / "ablations.json", record(list(runs.values()), options))
    print("\n".join(["", *table(rows(list(runs.values())))]))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches.ablations", description="What parts of the methods are worth, on digits.")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for ablations.json; runs that it has are kept")
    made.add_argument("--seeds", type=int, default=2, metavar="N", help="seeds 0 … N - 1 of each run")
    made.add_argument("--only", choices=sorted(SHORT), action="append", default=[], help="this host only; may be given again")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of fastkd run, in every run")
    made.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the record")
    return made


def wanted(options: argparse.Namespace) -> list[Ablation]:
    """The ablations whose host is registered, and asked for."""
    return [a for a in ABLATIONS if a.method in methods.METHODS and (not options.only or a.method in options.only)]


def older(options: argparse.Namespace) -> dict[tuple[str, tuple[str, ...], int], dict[str, Any]]:
    """Runs of the record in --out: a run of the bench adds to it."""
    found = _budget.older(options.out / "ablations.json").get("runs", [])
    return {(r["method"], tuple(r["switch"]), r["seed"]): r for r in found}


def run(method: str, switch: tuple[str, ...], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: [method, switch, seed] with its accuracy by epoch.

    Raises:
      BenchError: it ended with another code than 0.
    """
    words = ["--recipe", f"{method}-digits", "--seed", str(seed), "--device", "cpu"]
    for text in (*(f"method.{s}" for s in (*SHORT[method], *switch)), *options.set):
        words += ["--set", text]
    out = options.out / "runs" / f"{method}-{seed}-{time.strftime('%H%M%S')}"
    spent = _budget.spend(words, out, LIMIT, options.threads)
    if spent.code:
        raise _budget.BenchError(f"{method} {' '.join(switch)} ended with code {spent.code}: {spent.said.strip()[-400:]}")
    top1 = [p[1] for p in spent.top1()]
    about = {"method": method, "switch": list(switch), "seed": seed, "command": "fastkd run " + " ".join(words)}
    return {**about, "commit": revision(), "cpu_seconds": round(spent.seconds, 1), "top1": top1[-1], "top1_by_epoch": top1}


def record(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": "top-1 (%) of the last epoch on 500 test digits, of methods as they are and without a part",
        "cpu": cpuinfo("model name"),
        "torch": torch.__version__,
        "threads": options.threads,
        "load": options.load,
        "runs": runs,
    }


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an ablation that has runs: accuracies by seed as it is and without, and in how many seeds it is lower without."""
    by = {(r["method"], tuple(r["switch"]), r["seed"]): r["top1"] for r in runs}
    out = []
    for own in ABLATIONS:
        seeds = [s for m, w, s in by if (m, w) == (own.method, own.switch) and (m, (), s) in by]
        if seeds:
            whole, without = ([by[own.method, w, s] for s in seeds] for w in ((), own.switch))
            fell = sum(a > b for a, b in zip(whole, without))
            change = round(statistics.fmean(without) - statistics.fmean(whole), 2)
            out.append({**dataclasses.asdict(own), "whole": whole, "without": without, "change": change, "fell": fell})
    return out


def verdict(row: dict[str, Any]) -> str:
    """ "yes" where every seed changed as reported, "no" where the mean did not, else how many did."""
    if row["change"] >= 0:
        return "no"
    return "yes" if row["fell"] == len(row["whole"]) else f"in {row['fell']} of {len(row['whole'])} seeds"


def cells(row: dict[str, Any]) -> list[str]:
    def mean(values: list[float]) -> str:
        return f"{statistics.fmean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"

    return [
        row["part"],
        row["method"],
        " ".join(row["switch"]),
        mean(row["whole"]),
        mean(row["without"]),
        f"{row['change']:+.1f}",
        verdict(row),
    ]


HEAD = ["part", "method", "switch", "as it is, mean (seeds)", "without", "change", "as reported"]


def table(found: list[dict[str, Any]]) -> list[str]:
    return aligned([HEAD, *map(cells, found)])


if __name__ == "__main__":
    sys.exit(main())
