"""MUSE at low resolutions beside NAYER at 224 px, with a pretrained ImageNet teacher and an equal budget of pixels:
`python -m benches.imagenet --data DIR --out DIR [--teacher efficientnet_lite0] [--resolutions 64 96]`.

Generator steps only, without the adversary (the warm-up of both methods). What a step costs in CPU seconds, and how often the teacher
names the class that a stored image was made for; beside it, how often it names photographs of that size rightly. DIR of `--data` holds
`checkpoints/imagenet/` and `imagenet/` (the photographs).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import assemble, data
from fastkd.config import resolve
from fastkd.data import embeddings
from fastkd.engine import loop
from fastkd.method import steps
from fastkd.methods._pool import statistics_norm

from . import _budget
from .facts import cpuinfo, revision
from .tables import aligned

WEIGHTS = {"efficientnet_lite0": "efficientnet_lite0", "mobilenet_v1_x075": "mobilenet_v1_075_224"}
STUDENT = "mobilenet_v1_x025"
METHODS = ("muse", "nayer")
LIKE_IMAGENET = 200.0
"""`bn` times the sum of the norms of a teacher's stored means and variances, layer by layer. The published 10 is for CIFAR, where that sum
is 405 in a ResNet-20; it is 6,504 in MobileNet v1 x0.75 and 21,397 in EfficientNet-Lite0, and with 10 the class is less than a thousandth
of the loss. FastDFKD's ImageNet form weighs the BN term and the class equally, so `bn` is `oh`, 0.5, for a sum of 405."""


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    path = options.out / f"imagenet-{options.teacher}.json"
    same = {"teacher": options.teacher, "batch": options.batch, "g_steps": options.g_steps, "precision": options.precision}
    kept = _budget.older(path, **same)
    rows, photographs = kept.get("rows", []), kept.get("photographs", {})
    for method in options.only or METHODS:
        made, known = measure(method, options, photographs)
        photographs |= known
        new = {key(r) for r in made}
        rows = [r for r in rows if key(r) not in new] + made
        _budget.write(path, record(rows, photographs, options))
    print("\n".join(table(rows, photographs)))
    return 0


def key(row: dict[str, Any]) -> tuple[str, int, float]:
    return row["method"], row["size"], row["bn"]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches.imagenet", description="MUSE at 64-96 px beside NAYER at 224 px.")
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with checkpoints/imagenet/ and imagenet/")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the record; a run adds to it")
    made.add_argument("--only", choices=METHODS, action="append", default=[], help="this method only; may be given again")
    made.add_argument("--teacher", choices=WEIGHTS, default="efficientnet_lite0")
    made.add_argument("--resolutions", type=int, nargs="+", default=[64, 96], metavar="PIXELS", help="of MUSE")
    made.add_argument("--batch", type=int, default=8, metavar="N", help="images of a generator step")
    made.add_argument("--loops", type=int, default=1, metavar="N", help="synthesis loops at 224 px; MUSE makes as many pixels")
    made.add_argument("--g-steps", type=int, default=60, metavar="N", help="generator steps a loop")
    made.add_argument("--bn", type=float, metavar="WEIGHT", help="of the BN term; else from the teacher's statistics")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    made.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the record")
    return made


def job_of(method: str, bn: float, options: argparse.Namespace) -> Any:
    fields = {
        **{"name": method, "epochs": 2, "warmup": 1, "batch": options.batch, "gwp_loops": options.loops, "g_loops": options.loops},
        **{"g_steps": options.g_steps, "kd_steps": 1, "kd_batch": options.batch, "bn": bn, "pool_select": "last"},
    }
    if method == "muse":
        fields["resolutions"] = options.resolutions
    weights = options.data / "checkpoints" / "imagenet" / f"{WEIGHTS[options.teacher]}.safetensors"
    table = {
        **{"method": fields, "device": "cpu", "precision": options.precision, "data": "none"},
        **{"teacher": {"spec": options.teacher, "weights": str(weights)}, "student": {"spec": STUDENT}},
        "embeddings": {"source": str(Path(embeddings.__file__).with_name("tables") / "imagenet.safetensors")},
    }
    return assemble.make_job(resolve(None, table))


def measure(method: str, options: argparse.Namespace, photographs: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row a resolution: steps and what one cost, images, and the share of them that the teacher gives their label; and the share of
    photographs of those sizes that it names rightly, for sizes that are not in `photographs` yet."""
    teacher = job_of(method, 1.0, options).given.teacher if options.bn is None else None
    job = job_of(method, options.bn if teacher is None else round(LIKE_IMAGENET / statistics_norm(teacher), 4), options)
    loop.prepare(job.method, job.given)
    cast = loop.autocast(job.method.device, job.settings.precision)
    spent: dict[int, list[float]] = {}
    for _, fn, args, occurrence in steps(job.method, 0):
        job.method.rng.at(job.settings.seed, 0, fn.__name__, occurrence)
        job.method.log.prefix = fn.__name__
        begin = time.process_time()
        with cast():
            fn(*args)
        job.method.step_ends()
        if fn.__name__ == "invert":
            spent.setdefault(args[0], []).append(time.process_time() - begin)
    rows = [row(method, job.method, size, seconds) for size, seconds in sorted(spent.items())]
    return rows, {str(size): named_rightly(job.method, size, options.data) for size in sorted(spent) if str(size) not in photographs}


def named_rightly(made: Any, size: int, folder: Path) -> float:
    """Share of the photographs, resized to `size`, whose class the teacher names (fp32)."""
    photographs = data.open_set(f"imagenet-compat:{folder / 'imagenet'}", "test", size=made.shape[1], channels=made.shape[0])
    hits = 0
    for images, labels in zip(photographs.images.split(50), photographs.labels.split(50), strict=True):
        x = images.permute(0, 3, 1, 2) / 255
        if size != x.shape[-1]:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        hits += hits_of(made, made.view(x, "none"), labels)
    return round(hits / len(photographs.labels), 4)


def hits_of(made: Any, x: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((made.teacher(x).logits.argmax(1) == labels.long()).sum())


def row(method: str, made: Any, size: int, seconds: list[float]) -> dict[str, Any]:
    pool = made.at[size].pool
    hits = sum(hits_of(made, made.view(pool.rows(part), "none"), pool.columns["label"][part]) for part in torch.arange(pool.fill).split(32))
    return {
        **{"method": method, "size": size, "bn": made.bn, "steps": len(seconds), "step_seconds": round(sum(seconds) / len(seconds), 4)},
        **{"cpu_seconds": round(sum(seconds), 1), "images": pool.fill, "megapixels": round(pool.fill * size * size / 1e6, 3)},
        **{"named": round(hits / pool.fill, 4), "commit": revision()},
    }


def record(rows: list[dict[str, Any]], photographs: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": "CPU seconds of a generator step, and the share of stored images that the teacher names as they were meant",
        **{"cpu": cpuinfo("model name"), "torch": torch.__version__, "threads": options.threads},
        **{"precision": options.precision, "load": options.load, "teacher": options.teacher, "batch": options.batch},
        **{"g_steps": options.g_steps, "photographs": photographs, "rows": rows},
    }


HEAD = ["method", "px", "bn", "generator steps", "CPU s a step", "CPU s", "images", "megapixels", "named as meant", "photographs"]


def cells(row: dict[str, Any], photographs: dict[str, float]) -> list[str]:
    times = [f"{row['bn']:g}", str(row["steps"]), f"{row['step_seconds']:.3f}", f"{row['cpu_seconds']:.0f}"]
    named = [f"{100 * share:.1f} %" for share in (row["named"], photographs[str(row["size"])])]
    return [row["method"], str(row["size"]), *times, str(row["images"]), f"{row['megapixels']:.2f}", *named]


def table(rows: list[dict[str, Any]], photographs: dict[str, float]) -> list[str]:
    return aligned([HEAD, *(cells(r, photographs) for r in rows)])


if __name__ == "__main__":
    sys.exit(main())
