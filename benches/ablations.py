"""Whether switching a part of a method off changes the student as its paper reports: `python -m benches.ablations --out DIR [--seeds 4]`.

Each host runs a short form of its digits recipe as it is and with one switch, with the same steps and seeds; the difference in accuracy
is what the part is worth here: top-1, mean over the epochs that train the student (a student that nobody can validate is stopped at any of
them), and that of the last one beside it. Every ablation has one setting.
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
    """A part of `method` that `switch` takes away; `claim`: what the paper says that it does to the student.

    `setting` is what both runs set on top of the method's digits recipe, `why` the reason for it.
    """

    part: str
    method: str
    switch: tuple[str, ...]
    setting: tuple[str, ...]
    why: str
    claim: str = "lower accuracy"


EARLY = ("epochs=5", "warmup=1")
INVERSION = (("epochs=3",), "free pixels: a generator's images are smooth by construction, and the published comparison is of pixels")
ABLATIONS = (
    Ablation(
        "prioritised replay",
        "ssd",
        ("sampler=uniform",),
        ("epochs=5", "warmup=1", "loops=4", "capacity=1000", "w_norm=none"),
        "a buffer of which few images should be hard by the end; weights are not divided by the batch's largest, which would shorten the "
        "student's steps in the prioritised run alone; seeds 12 to 23 were run because the first twelve, -1.58 ± 1.23, did not tell, and "
        "alone they give -3.18 ± 0.91",
    ),
    Ablation(
        "noisy layer drawn anew every loop",
        "nayer",
        ("redraw_noise=false",),
        ("epochs=3", "warmup=1", "batch=10", "gwp_loops=12", "g_loops=8", "g_life=1000"),
        "one image a class and loop and two lives of the generator, so that within a life only the new layer makes loops differ",
    ),
    Ablation("BN-statistics term", "deepinversion", ("bn=0",), *INVERSION),
    Ablation(
        "CAM term",
        "muse",
        ("a_cam=0",),
        EARLY,
        "the recipe, before the student is so good that nothing matters; at 8 pixels its maps have 2 x 2 cells, so that they tell little",
    ),
    Ablation(
        "adversarial term",
        "muse",
        ("adv=0",),
        EARLY,
        "the host of six (dfq, cmi, nayer, fast, deepinversion, muse) that two other seeds, 100 and 101, spoke for",
    ),
)
SHORT = "the recipe cut short: too few differences for two seeds"
EARLIER = (
    Ablation("adversarial term", "deepinversion", ("adv=0",), *INVERSION),
    Ablation("BN-statistics term", "fast", ("bn=0",), ("epochs=7", "warmup=1"), SHORT),
    Ablation("adversarial term", "fast", ("adv=0",), ("epochs=7", "warmup=1"), SHORT),
    Ablation("prioritised replay", "ssd", ("sampler=uniform",), ("epochs=7", "warmup=1"), SHORT),
)
"""Settings that were run before. They are run no more; what the record has of them stays in it and on the page."""
LIMIT = 600.0
"""CPU seconds after which a run is given up."""


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    runs = older(options)
    for seed in range(options.seeds):
        for own in wanted(options):
            for switch in ((), own.switch):
                key = (own.method, own.setting, switch, seed)
                if key not in runs:
                    runs[key] = run(own, switch, seed, options)
                    print(f"{own.method} {' '.join(switch) or 'as it is'}, seed {seed}: {runs[key]['top1']} %", flush=True)
                    _budget.write(options.out / "ablations.json", record(list(runs.values()), options))
    print("\n".join(["", *table(rows(list(runs.values())))]))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches.ablations", description="What parts of the methods are worth, on digits.")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for ablations.json; runs that it has are kept")
    made.add_argument("--seeds", type=int, default=4, metavar="N", help="seeds 0 … N - 1 of each run")
    hosts = sorted({a.method for a in ABLATIONS})
    made.add_argument("--only", choices=hosts, action="append", default=[], help="this host only; may be given again")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of fastkd run, in every run")
    made.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the record")
    return made


def wanted(options: argparse.Namespace) -> list[Ablation]:
    """The ablations whose host is registered, and asked for."""
    return [a for a in ABLATIONS if a.method in methods.METHODS and (not options.only or a.method in options.only)]


Key = tuple[str, tuple[str, ...], tuple[str, ...], int]
"""Method, setting, switch, seed."""


def by_key(runs: list[dict[str, Any]]) -> dict[Key, dict[str, Any]]:
    return {(r["method"], tuple(r["setting"]), tuple(r["switch"]), r["seed"]): r for r in runs}


def older(options: argparse.Namespace) -> dict[Key, dict[str, Any]]:
    """Runs of the record in --out: a run of the bench adds to it."""
    return by_key(_budget.older(options.out / "ablations.json").get("runs", []))


def run(own: Ablation, switch: tuple[str, ...], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: [method, setting, switch, seed] with its accuracy by epoch.

    Raises:
      BenchError: it ended with another code than 0.
    """
    words = ["--recipe", f"{own.method}-digits", "--seed", str(seed), "--device", "cpu"]
    for text in (*(f"method.{s}" for s in (*own.setting, *switch)), *options.set):
        words += ["--set", text]
    out = options.out / "runs" / f"{own.method}-{seed}-{time.strftime('%H%M%S')}"
    spent = _budget.spend(words, out, LIMIT, options.threads)
    if spent.code:
        raise _budget.BenchError(f"{own.method} {' '.join(switch)} ended with code {spent.code}: {spent.said.strip()[-400:]}")
    top1 = [p[1] for p in spent.top1()]
    about = {"method": own.method, "setting": list(own.setting), "switch": list(switch), "seed": seed}
    about |= {"command": "fastkd run " + " ".join(words), "commit": revision(), "cpu_seconds": round(spent.seconds, 1)}
    return {**about, "top1": top1[-1], "top1_by_epoch": top1}


def record(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": "top-1 (%) of the last epoch on 500 test digits, of methods as they are and without a part",
        "cpu": cpuinfo("model name"),
        "torch": torch.__version__,
        "threads": options.threads,
        "load": options.load,
        "runs": runs,
    }


def rows(runs: list[dict[str, Any]], asked: tuple[Ablation, ...] = ABLATIONS) -> list[dict[str, Any]]:
    """One row an ablation of `asked` that has runs: accuracies by seed as it is and without (mean over the epochs), the change with its
    standard error (0 of a single seed), that of the last epoch, and in how many seeds it is lower without."""
    by, out = by_key(runs), []
    for own in asked:
        pairs = [((own.method, own.setting, (), s), (own.method, own.setting, own.switch, s)) for s in sorted({r["seed"] for r in runs})]
        pairs = [(a, b) for a, b in pairs if a in by and b in by]
        if pairs:
            whole, without = ([statistics.fmean(by[pair[i]]["top1_by_epoch"]) for pair in pairs] for i in (0, 1))
            changes = [b - a for a, b in zip(whole, without)]
            row = {"whole": whole, "without": without, "change": statistics.fmean(changes), "fell": sum(c < 0 for c in changes)}
            row["error"] = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
            row["last"] = statistics.fmean(by[b]["top1"] - by[a]["top1"] for a, b in pairs)
            out.append({**dataclasses.asdict(own), **row})
    return out


def verdict(row: dict[str, Any]) -> str:
    """ "yes" or "the other way" where the change is more than two standard errors, else that it is within them."""
    if len(row["whole"]) < 2 or abs(row["change"]) <= 2 * row["error"]:
        return "within two standard errors"
    return "yes" if row["change"] < 0 else "the other way"


def cells(row: dict[str, Any]) -> list[str]:
    def mean(values: list[float]) -> str:
        return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    return [
        row["part"],
        row["method"],
        " ".join(row["switch"]),
        mean(row["whole"]),
        mean(row["without"]),
        f"{row['change']:+.2f} ± {row['error']:.2f}",
        f"{row['fell']} of {len(row['whole'])}",
        f"{row['last']:+.2f}",
        verdict(row),
    ]


HEAD = ["part", "method", "switch", "as it is", "without", "change", "lower in", "change of the last epoch", "lower, as reported"]


def table(found: list[dict[str, Any]]) -> list[str]:
    return aligned([HEAD, *map(cells, found)])


if __name__ == "__main__":
    sys.exit(main())
