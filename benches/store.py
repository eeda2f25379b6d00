"""What it costs to have images elsewhere than on the device: `python -m benches.store [--json FILE]`.

A student step on rows of a dealt order: gather (crop, flip, normalise), teacher, student forward and backward, SGD. Its part is all that
brings the batch: with images on the device the gather alone, else also the pick in host memory, the copy and the exchange between ranks,
as far as the step waits for them. Without prefetch a batch is fetched when it is wanted.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch.nn.functional as F

from fastkd import models, optim, ranks
from fastkd.memory import Store, ahead
from fastkd.nn import Student, instrument
from fastkd.rng import Rng

from ._ranked import Parts, launch, options, publish, row

WHAT = "a student step, and the part of it that brings the batch (ms); share: of all the time"
PLACES = [("replicated", "device", 0), ("replicated", "host", 0), ("replicated", "host", ahead.DEPTH)]
SHARDED = [("sharded", "device", 0), ("sharded", "device", ahead.DEPTH), ("sharded", "host", 0), ("sharded", "host", ahead.DEPTH)]


def main(argv: list[str] | None = None) -> int:
    parser = options("store", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="height and width of an image")
    parser.add_argument("--images", type=int, default=16384, metavar="N", help="images in the store; 1,280,000 of 112 px are 48 GB")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images of a step, over all ranks")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps that are timed, after a tenth of them to warm up")
    parser.add_argument("--teacher", default="resnet20", metavar="SPEC")
    parser.add_argument("--student", default="resnet8", metavar="SPEC")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.images, args.batch, args.steps = 8, 64, 8, 4
    publish(WHAT, "store", sys.argv[1:] if argv is None else argv, args, launch(measured, args, args.gpus))
    return 0


def measured(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    return [one(args, device, *place) for place in PLACES + (SHARDED if ranks.world() > 1 else [])]


def one(args: argparse.Namespace, device: torch.device, images: Any, tier: Any, depth: int) -> dict[str, Any]:
    """The row of one placement, with `depth` batches brought ahead."""
    torch.manual_seed(0)
    shape, rng = (3, args.size, args.size), Rng(device)
    rng.at(0, 0, "deal", 0)
    store = Store(rng, args.images, shape, images=images, tier=tier)
    for _ in range(args.images // args.batch):
        store.put(torch.randint(256, (args.batch, args.size, args.size, 3), dtype=torch.uint8, device=device))
    warm = max(2, args.steps // 10)
    store.reserve((args.steps + warm + 1) * args.batch)
    ahead.DEPTH = depth
    store.deal()
    nets = [models.build(spec, classes=100, channels=3, input_size=args.size) for spec in (args.teacher, args.student)]
    nets = [net.to(device, memory_format=torch.channels_last) for net in nets]  # type: ignore[call-overload]
    teacher, student = instrument(nets[0], shape=shape), Student(nets[1], shape=shape)
    opt = optim.sgd(list(student.parameters()), lr=0.1)
    mean, std = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    parts = Parts(device)

    def bring() -> torch.Tensor:
        rows = store.next(args.batch)
        middle = torch.full_like(rows.index, 4)
        return rows.gather(dy=middle, dx=middle, flip=rows.index % 2 == 0, pad=4, mean=mean, std=std)

    def step() -> None:
        x = timed_bring()
        with torch.no_grad():
            t = teacher(x).logits
        loss = F.kl_div(student(x).log_softmax(1), t.softmax(1), reduction="batchmean")
        params = list(student.parameters())
        for p, g in zip(params, torch.autograd.grad(loss, params)):
            p.grad = g
        opt.step()

    timed_bring, timed_step = parts("bring", bring), parts("step", step)
    for n in range(warm + args.steps):
        if n >= warm:
            parts.step()
        timed_step()
    labels = {"images": images, "tier": tier, "prefetch": depth, "ranks": ranks.world(), "batch": args.batch, "size": args.size}
    return row(labels, parts.ms("step"), parts.ms("bring"))


if __name__ == "__main__":
    sys.exit(main())
