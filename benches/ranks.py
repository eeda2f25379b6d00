"""What the ranks' words to each other cost: `python -m benches.ranks [--json FILE]`.

Of each kind of step that updates something: the flat all-reduce of gradients and term values (`Method._reduce`), which bucketing could
at most hide behind the backward pass, and all collectives, those of BN statistics and global BatchNorm included. A part has the time
in which a rank waits for a slower one. `alone` is the same all-reduce right after a barrier: the words without the waiting.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from fastkd import assemble, ranks
from fastkd.config import resolve
from fastkd.engine import loop
from fastkd.method import Method, steps

from ._ranked import Parts, launch, options, publish, row

WARM = 3
"""First steps of each kind that are not counted."""
WHAT = "steps of a method and their flat all-reduce (ms); share: of all the time; collectives: share of all of them"


def main(argv: list[str] | None = None) -> int:
    parser = options("ranks", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--recipe", default="fast-digits", metavar="NAME", help="the run whose steps are timed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="as in `fastkd run`")
    args = parser.parse_args(argv)
    if args.gpus < 2:
        parser.error("--gpus is less than 2, and one rank has nobody to talk to")
    if args.quick:
        args.sets = [*(f"method.{s}" for s in ("batch=8", "kd_batch=8", "kd_steps=4", "g_steps=4", "loops=1", "warmup=1")), *args.sets]
    publish(WHAT, "ranks", sys.argv[1:] if argv is None else argv, args, launch(measured, args, args.gpus))
    return 0


def measured(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the kinds of steps that update something, in the epochs up to the first that trains the student."""
    job = assemble.make_job(resolve(args.recipe, {"device": str(device)}, args.sets))
    method, cast = job.method, loop.autocast(job.given.device, job.settings.precision)
    loop.prepare(method, job.given, global_bn=job.settings.global_bn)
    running, parts, sizes, taken = [""], {}, {}, {}
    reduce, all_reduce = Method._reduce, dist.all_reduce

    def flat(self: Method, values: Any, params: Any, grads: Any) -> Any:
        sizes[running[0]] = values.numel() + 1 + sum(g.numel() for p, g in zip(params, grads) if not getattr(p, "per_sample", False))
        return parts[running[0]]("flat", reduce)(self, values, params, grads)

    Method._reduce = flat  # type: ignore[method-assign]
    dist.all_reduce = lambda *a, **k: parts[running[0]]("all", all_reduce)(*a, **k)
    try:
        first = next(e for e in range(method.epochs) if method.trains_student(e))
        for e in range(first + 1):  # the epochs before it fill the store
            for _, fn, given, n in steps(method, e):
                name = running[0] = fn.__name__
                own, taken[name] = parts.setdefault(name, Parts(device)), taken.get(name, 0) + 1
                if taken[name] > WARM:
                    own.step()
                method.rng.at(job.settings.seed, e, name, n)
                method.log.prefix = name
                with cast():
                    own("step", fn)(*given)
                method.step_ends()
    finally:
        Method._reduce, dist.all_reduce = reduce, all_reduce  # type: ignore[method-assign]
    out = []
    for name, numbers in ((n, size) for n, size in sizes.items() if taken[n] > WARM):
        whole = parts[name].ms("step")
        labels = {"recipe": args.recipe, "step": name, "ranks": ranks.world(), "steps": len(whole), "numbers": numbers}
        line = row(labels, whole, parts[name].ms("flat")) | {"alone_ms": alone(numbers, device)}
        out.append(line | {"collectives": round(sum(parts[name].ms("all")) / sum(whole), 4)})
    return out


def alone(numbers: int, device: torch.device) -> float:
    """Median milliseconds of an all-reduce of so many numbers that all ranks begin together."""
    x, times = torch.zeros(numbers, device=device), []
    for _ in range(20):
        ranks.barrier()
        begin = time.perf_counter()
        dist.all_reduce(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return round(statistics.median(times), 4)


if __name__ == "__main__":
    sys.exit(main())
