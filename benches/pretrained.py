"""Methods with a teacher that somebody else trained, each for the same CPU time:
`python -m benches.pretrained --data DIR --method NAME --cpu-minutes 20 --out DIR`.

DIR of `--data` holds `cifar10/` and `checkpoints/cifar10/akamaster_resnet20.safetensors`. A probe of two epochs measures first what
an epoch costs; the number of epochs follows from it, so that the learning rate has fallen to its end when the time is over.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import _budget
from .facts import cpuinfo, revision

TEACHER, WEIGHTS = "resnet20", "checkpoints/cifar10/akamaster_resnet20.safetensors"
STUDENT = "wrn10_1"
"""The cheapest network here whose accuracy with real images is known, and of another family than the teacher: pre-activation."""
COMMON: dict[str, Any] = {"batch": 128, "kd_batch": 128, "kd_steps": 150, "lr": 0.1}
WARMUP = 0.08
"""Share of the epochs in which only images are made."""
INVERSION = {"gwp_loops": 5, "g_loops": 1, "g_steps": 15, "g_life": 1000}
METHODS: dict[str, dict[str, Any]] = {
    "noise": {"n_images": 20_000},
    "fast": {"loops": 4, "g_steps": 5},
    "ssd": {"loops": 4, "g_steps": 5},
    "nayer": INVERSION,
    "muse": INVERSION,
}
"""What differs from a method's defaults, which are sized for hours on a GPU."""


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        record = measure(options)
    except _budget.BenchError as error:
        print(f"benches.pretrained: {error}", file=sys.stderr)
        return 1
    _budget.write(options.out / f"pretrained-{options.method}.json", record)
    print(f"{options.method}: top-1 {record['top1']} % after {record['cpu_seconds']} CPU seconds, {record['epochs']} epochs")
    return 0 if record["code"] in (0, 75) else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches.pretrained", description="Methods with a pretrained CIFAR-10 teacher.")
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with cifar10/ and checkpoints/")
    made.add_argument("--method", choices=METHODS, required=True)
    made.add_argument("--cpu-minutes", type=float, default=20.0, metavar="N", help="user + system time of the run, evaluation included")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the record and the run folders")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of fastkd run, over the settings of this file")
    made.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the record")
    return made


def words(options: argparse.Namespace, epochs: int, warmup: int) -> list[str]:
    """The words of `fastkd run`, but for --out."""
    fields = {**COMMON, **METHODS[options.method], "epochs": epochs, "warmup": warmup}
    given = ["--teacher", TEACHER, "--teacher-weights", str(options.data / WEIGHTS), "--student", STUDENT]
    given += ["--data", f"cifar10:{options.data / 'cifar10'}", "--method", options.method, "--seed", str(options.seed)]
    given += ["--device", "cpu", "--precision", options.precision]
    if options.method == "noise":
        fields.pop("batch")
    for text in (*(f"method.{k}={v}" for k, v in fields.items()), *options.set):
        given += ["--set", text]
    return given


def measure(options: argparse.Namespace) -> dict[str, Any]:
    budget = 60 * options.cpu_minutes
    out = options.out / "runs" / f"{options.method}-{time.strftime('%H%M%S')}"
    share = 0.0 if options.method == "noise" else WARMUP
    plan = _budget.plan(lambda e, w: words(options, e, w), out.with_name(f"{out.name}-probe"), budget, share, options.threads)
    command = words(options, plan["epochs"], plan["warmup"])
    spent = _budget.spend(command, out, budget, options.threads)
    curve = spent.top1()
    return {
        "what": "top-1 (%) on the test images against CPU seconds (user + system) of the process",
        "name": options.method,
        "command": "fastkd run " + " ".join(command).replace(str(options.data), "DIR"),
        "commit": revision(),
        "cpu": cpuinfo("model name"),
        "torch": torch.__version__,
        "threads": options.threads,
        "precision": options.precision,
        "seed": options.seed,
        "load": options.load,
        "budget": budget,
        "code": spent.code,
        "cpu_seconds": round(spent.seconds, 1),
        "start_seconds": round(spent.start, 1),
        "evaluation_seconds": round(spent.evaluation, 1),
        "plan": plan,
        "epochs": len(spent.points),
        "student_steps": sum(e["trained"] for _, e in spent.points) * {**COMMON, **METHODS[options.method]}["kd_steps"],
        "teacher": {"spec": TEACHER, **spent.teacher},
        "student": STUDENT,
        "top1": curve[-1][1] if curve else None,
        "seconds_top1": curve,
        "terms": spent.points[-1][1]["terms"] if spent.points else {},
    }


if __name__ == "__main__":
    sys.exit(main())
