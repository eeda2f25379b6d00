"""Replay: a batch out of an image store (gather, crop, flip, normalise; the same 256 rows in every call), and prioritised draws.

On a GPU there is also a batch that fills the chip, and each op of the tree alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import ops
from fastkd.ops.replay.reference import replay_gather_ref

from . import _png, _replay_tree, peers
from ._case import Call, CannotRun, Case, Plan, Provider, compiled, ours, provider
from ._timing import measure_all

OP = "replay_gather"
STORES = [(50_000, 32, 256), (4_096, 112, 256)]
"""Images, height and width, batch."""
FULL = (20_000, 112, 2048)
TINY = [(64, 12, 8)]
PAD = 4


def run(plan: Plan) -> list[dict[str, Any]]:
    return measure_all(cases(plan), plan)


def cases(plan: Plan) -> Iterator[Case]:
    if plan.cuda:
        yield from on_gpu(plan)
        return
    for last in (True, False):
        for store in TINY if plan.quick else STORES:
            yield case(plan, *store, last, files=last)
    yield from _replay_tree.cases(plan)


def on_gpu(plan: Plan) -> Iterator[Case]:
    bf16 = torch.bfloat16
    yield case(plan, *(TINY[0] if plan.quick else FULL), True, files=False, dtype=bf16, full=True)
    yield from _replay_tree.cases(plan)
    yield from _replay_tree.alone(plan)
    for store in () if plan.quick else STORES:
        yield case(plan, *store, True, files=False, dtype=bf16)
    if not plan.quick:
        yield case(plan, *FULL, False, files=False, full=True)


def case(
    plan: Plan, n: int, size: int, batch: int, last: bool, *, files: bool, dtype: torch.dtype = torch.float32, full: bool = False
) -> Case:
    draw = torch.Generator(plan.device).manual_seed(6)

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=draw, device=plan.device, dtype=dtype)

    images = integers(256, n, size, size, 3, dtype=torch.uint8)
    index, dy, dx = integers(n, batch), integers(2 * PAD + 1, batch), integers(2 * PAD + 1, batch)
    flip = integers(2, batch).bool()
    mean, std = torch.tensor([0.49, 0.48, 0.44], device=plan.device), torch.tensor([0.25, 0.24, 0.26], device=plan.device)
    args = (images, index, dy, dx, flip, PAD, mean, std, None, "bilinear", last, dtype)
    where = list(zip(index.tolist(), dy.tolist(), dx.tolist(), flip.tolist()))

    def slices() -> tuple[Tensor]:
        """One image after the other: convert, pad, cut, mirror; then stack and normalise."""
        out = []
        for i, top, left, mirrored in where:
            image = F.pad(images[i].permute(2, 0, 1).float().div(255), (PAD, PAD, PAD, PAD))
            image = image[:, top : top + size, left : left + size]
            out.append(image.flip(2) if mirrored else image)
        return (((torch.stack(out) - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)).to(dtype),)

    def one_by_one() -> Call:
        if full:
            raise CannotRun(f"a loop over {batch} images")
        return slices

    def public() -> tuple[Tensor]:
        memory = torch.channels_last if last else torch.contiguous_format
        options = {"dy": dy, "dx": dx, "flip": flip, "pad": PAD, "mean": mean, "std": std}
        return (ops.replay_gather(images, index, **options, memory_format=memory, dtype=dtype),)

    def of(fn: Any) -> Any:
        return lambda: (fn(*args),)

    def pool(rebuilt: bool) -> Any:
        return lambda: _png.pool(images, batch, PAD, mean, std, rebuilt=rebuilt)

    published = [
        provider("PNG files + DataLoader", "peer", pool(False), checked=False, batches=_png.BATCHES),
        provider("PNG files + DataLoader, rebuilt", "peer", pool(True), checked=False, batches=_png.BATCHES),
    ]
    layout = "channels_last" if last else "NCHW"
    return Case(
        op=OP,
        labels={
            "case": f"{n} images{', full' if full else ''}",
            "shape": f"{batch}x3x{size}x{size}",
            "layout": layout,
            "dtype": f"uint8 to {str(dtype)[6:]}",
        },
        providers=[
            Provider("advanced indexing", "eager", of(replay_gather_ref)),
            provider("slice loop", "eager", one_by_one),
            provider("compile(advanced indexing)", "compile", lambda: of(compiled(plan, replay_gather_ref))),
            *ours(OP, plan, public, definition=False),
            provider("cpprb sample", "peer", lambda: peers.cpprb(images, batch, mean, std), checked=False),
            provider("torchrl sample", "peer", lambda: peers.torchrl(images, batch, mean, std), checked=False),
            *(published if files and not plan.quick else []),
        ],
        truth=lambda: (replay_gather_ref(*args[:-1], torch.float64),),
        baseline="advanced indexing",
        tolerance=1e-6 if dtype == torch.float32 else None,
        bytes=batch * size * size * 3 * (1 + dtype.itemsize),  # reads bytes, writes floats
    )
