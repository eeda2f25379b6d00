"""MUSE at low resolutions beside NAYER at 224 px, with a pretrained ImageNet teacher and an equal budget of pixels:
`python -m benches.imagenet --data DIR --out DIR [--teacher efficientnet_lite0] [--resolutions 64 96]`.

Generator steps only, without the adversary (the warm-up of both methods). What a step costs in CPU seconds, and how often the teacher
names the class that a stored image was made for. DIR of `--data` holds `checkpoints/imagenet/`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastkd import assemble
from fastkd.config import resolve
from fastkd.engine import loop
from fastkd.method import steps

from . import _budget
from .facts import cpuinfo, revision
from .tables import aligned

WEIGHTS = {"efficientnet_lite0": "efficientnet_lite0", "mobilenet_v1_x075": "mobilenet_v1_075_224"}
STUDENT = "mobilenet_v1_x025"


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for method in ("muse", "nayer"):
        rows += measure(method, options)
        _budget.write(options.out / f"imagenet-{options.teacher}.json", record(rows, options))
    print("\n".join(table(rows)))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches.imagenet", description="MUSE at 64-96 px beside NAYER at 224 px.")
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with checkpoints/imagenet/")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the record")
    made.add_argument("--teacher", choices=WEIGHTS, default="efficientnet_lite0")
    made.add_argument("--resolutions", type=int, nargs="+", default=[64, 96], metavar="PIXELS", help="of MUSE")
    made.add_argument("--batch", type=int, default=8, metavar="N", help="images of a generator step")
    made.add_argument("--loops", type=int, default=1, metavar="N", help="synthesis loops at 224 px; MUSE makes as many pixels")
    made.add_argument("--g-steps", type=int, default=30, metavar="N", help="generator steps a loop")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    made.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the record")
    return made


def job_of(method: str, options: argparse.Namespace) -> Any:
    fields = {
        **{"name": method, "epochs": 2, "warmup": 1, "batch": options.batch, "gwp_loops": options.loops, "g_loops": options.loops},
        **{"g_steps": options.g_steps, "kd_steps": 1, "kd_batch": options.batch},
    }
    if method == "muse":
        fields["resolutions"] = options.resolutions
    weights = options.data / "checkpoints" / "imagenet" / f"{WEIGHTS[options.teacher]}.safetensors"
    table = {
        **{"method": fields, "device": "cpu", "precision": options.precision, "data": "none"},
        **{"teacher": {"spec": options.teacher, "weights": str(weights)}, "student": {"spec": STUDENT}},
    }
    return assemble.make_job(resolve(None, table))


def measure(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a resolution: steps and what one cost, images, and the share of them that the teacher gives their label."""
    job = job_of(method, options)
    loop.prepare(job.method, job.given)
    cast = loop.autocast(job.method.device, job.precision)
    spent: dict[int, list[float]] = {}
    for _, fn, args, occurrence in steps(job.method, 0):
        job.method.rng.at(job.seed, 0, fn.__name__, occurrence)
        job.method.log.prefix = fn.__name__
        begin = time.process_time()
        with cast():
            fn(*args)
        job.method.step_ends()
        if fn.__name__ == "invert":
            spent.setdefault(args[0], []).append(time.process_time() - begin)
    return [row(method, job.method, size, seconds) for size, seconds in sorted(spent.items())]


def row(method: str, made: Any, size: int, seconds: list[float]) -> dict[str, Any]:
    pool = made.at[size].pool
    index = torch.arange(pool.fill)
    hits = 0
    with torch.no_grad():
        for part in index.split(32):
            named = made.teacher(made.view(pool.rows(part), "none")).logits.argmax(1)
            hits += int((named == pool.columns["label"][part].long()).sum())
    return {
        **{"method": method, "size": size, "steps": len(seconds), "step_seconds": round(sum(seconds) / len(seconds), 4)},
        **{"cpu_seconds": round(sum(seconds), 1), "images": pool.fill, "megapixels": round(pool.fill * size * size / 1e6, 3)},
        **{"named": round(hits / pool.fill, 4)},
    }


def record(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": "CPU seconds of a generator step, and the share of stored images that the teacher names as they were meant",
        **{"commit": revision(), "cpu": cpuinfo("model name"), "torch": torch.__version__, "threads": options.threads},
        **{"precision": options.precision, "load": options.load, "teacher": options.teacher, "batch": options.batch},
        **{"g_steps": options.g_steps, "rows": rows},
    }


HEAD = ["method", "px", "generator steps", "CPU s a step", "CPU s", "images", "megapixels", "named as meant"]


def cells(row: dict[str, Any]) -> list[str]:
    times = [str(row["steps"]), f"{row['step_seconds']:.3f}", f"{row['cpu_seconds']:.0f}"]
    return [row["method"], str(row["size"]), *times, str(row["images"]), f"{row['megapixels']:.2f}", f"{100 * row['named']:.1f} %"]


def table(rows: list[dict[str, Any]]) -> list[str]:
    return aligned([HEAD, *map(cells, rows)])


if __name__ == "__main__":
    sys.exit(main())
