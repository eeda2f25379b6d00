"""Nearest upsampling and a 3x3 convolution against the transposed convolution that equals them, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd import ops
from fastkd.ops.upsample.reference import upsample_conv2d_fold, upsample_conv2d_ref

from ._case import Call, Case, Plan, Provider, compiled, ours, provider
from ._timing import measure_all

OP = "upsample_conv2d"
STAGES = [(256, 128, 8, 128), (256, 128, 16, 64)]
"""Batch, channels in, height and width, channels out: the two doubling stages of g_fast for 32x32."""
TINY = [(4, 8, 4, 8)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def run(plan: Plan) -> list[dict[str, Any]]:
    return measure_all(cases(plan), plan)


def cases(plan: Plan) -> Iterator[Case]:
    for dtype in plan.dtypes:
        for stage in TINY if plan.quick else STAGES:
            for layout in LAYOUTS:
                yield case(plan, stage, layout, dtype)


def case(plan: Plan, stage: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Case:
    n, c_in, hw, c_out = stage
    draw = torch.Generator().manual_seed(4)

    def made(*size: int, scale: float = 1.0) -> Tensor:
        v = (torch.randn(*size, generator=draw) * scale).to(plan.device, dtype)
        return v.contiguous(memory_format=LAYOUTS[layout]) if v.dim() == 4 else v

    x, bias = made(n, c_in, hw, hw).requires_grad_(), made(c_out).requires_grad_()
    weight = made(c_out, c_in, 3, 3, scale=(9 * c_in) ** -0.5).requires_grad_()
    gy = made(n, c_out, 2 * hw, 2 * hw)
    inputs = (x, weight, bias)

    def both(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...] = inputs, gy: Tensor = gy) -> Call:
        def call() -> tuple[Tensor, ...]:
            y = fn(*inputs)
            return (y, *torch.autograd.grad(y, inputs, gy))

        return call

    return Case(
        op=OP,
        labels={
            "case": f"{c_in} to {c_out}",
            "shape": f"{n}x{c_in}x{hw}x{hw}",
            "layout": layout,
            "dtype": str(dtype)[6:],
            "pass": "fwd+bwd",
        },
        providers=[
            Provider("nearest + conv", "eager", both(upsample_conv2d_ref)),
            provider("compile(nearest + conv)", "compile", lambda: both(compiled(plan, upsample_conv2d_ref))),
            provider("compile(identity)", "compile", lambda: both(compiled(plan, upsample_conv2d_fold))),
            *ours(OP, plan, both(ops.upsample_conv2d), definition=False),
        ],
        truth=both(upsample_conv2d_ref, tuple(v.detach().double().requires_grad_() for v in inputs), gy.double()),
        baseline="nearest + conv",
        tolerance={torch.float32: 1e-4}.get(dtype),
        flops=3 * 2 * 16 * n * c_in * c_out * hw * hw,  # 16 taps an input pixel, forward and two gradients
    )
