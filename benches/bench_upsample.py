"""Low-resolution generation: a generator's doubling stage, and what else stands beside a nearest doubling, forward and backward.

A stage is nearest doubling, 3x3 convolution, BatchNorm over the batch, LeakyReLU. Its rungs have rows of their own, so that each gain
has its name: the identity alone (doubling and convolution as one transposed convolution, stock torch), the identity compiled with
BatchNorm and activation, and the identity with our BatchNorm. bf16 is measured in channels_last, where convolutions in bf16 are fast.
On a GPU there are larger batches, and BatchNorm with its activation alone on a tensor that fills the chip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import ops
from fastkd.ops.upsample.reference import (
    upsample_affine_act_ref,
    upsample_conv2d_fold,
    upsample_conv2d_ref,
    upsampled_stem_conv2d_fold,
    upsampled_stem_conv2d_ref,
)

from ._case import Call, Case, Plan, Provider, compiled, ours, provider
from ._timing import measure_all

FAST = [(256, 128, 8, 128), (256, 128, 16, 64)]
DEEP = [(8, 64, 28, 64), (4, 64, 56, 64)]
"""Batch, channels in, height and width, channels out: the two stages of g_fast for 32x32, and the last two of an ImageNet generator."""
FULL = (256, 64, 112, 112)
"""Input of a BatchNorm that fills a GPU."""
DOUBLED = (1024, 3, 112)
"""Batch, channels, height and width of small images that do."""
TINY = [(4, 8, 4, 8)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SECONDS = 5.0
"""What the rounds of one case may take."""


def run(plan: Plan) -> list[dict[str, Any]]:
    return measure_all(cases(plan), plan)


def cases(plan: Plan) -> Iterator[Case]:
    if plan.cuda and not plan.quick:
        yield from on_gpu(plan)
        return
    if plan.cuda:
        yield normed(plan, (2, 8, 6, 6), "NCHW", torch.float32)
    for shape in TINY if plan.quick else FAST:
        for layout in LAYOUTS:
            yield stage(plan, shape, layout, torch.float32)
        yield stage(plan, shape, "channels_last", torch.bfloat16)
    for shape in TINY if plan.quick else DEEP:
        yield stage(plan, shape, "channels_last", torch.float32)
    for layout in LAYOUTS:
        yield convolution(plan, (TINY if plan.quick else FAST)[0], layout, torch.float32)
        yield doubled_tanh(plan, (2, 3, 8) if plan.quick else (64, 3, 56), layout, torch.float32)
    yield stem(plan, (2, 3, 8, 4) if plan.quick else (16, 3, 56, 64), "channels_last")


def on_gpu(plan: Plan) -> Iterator[Case]:
    fp32, bf16, last = torch.float32, torch.bfloat16, "channels_last"
    yield stage(plan, FAST[1], last, bf16)
    for layout in (last, "NCHW"):
        yield normed(plan, FULL, layout, bf16)
        yield doubled_tanh(plan, DOUBLED, layout, bf16)
    yield stage(plan, FAST[0], last, bf16)
    yield stage(plan, FAST[1], last, fp32)
    yield normed(plan, FULL, last, fp32)
    for _, c_in, hw, c_out in reversed(DEEP):
        yield stage(plan, (64, c_in, hw, c_out), last, bf16)
    yield stage(plan, FAST[0], "NCHW", fp32)
    yield doubled_tanh(plan, DOUBLED, "NCHW", fp32)
    yield convolution(plan, FAST[0], last, bf16)
    yield stem(plan, (256, 3, 56, 64), last)


Inputs = tuple[Tensor, ...]


def case(
    op: str, labels: dict[str, str], inputs: Inputs, out: tuple[int, ...], rows: Callable[[Any], list[Provider]], truth: Any, **more: Any
) -> Case:
    """A case whose calls give the result and the gradients of `inputs`, for an incoming gradient that is not ones."""
    x = inputs[0]
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1 else torch.contiguous_format
    draw = torch.Generator(x.device).manual_seed(5)
    gy = torch.randn(*out, generator=draw, device=x.device).to(x.dtype).contiguous(memory_format=layout)
    exact = tuple(v.detach().double().requires_grad_() for v in inputs)

    def both(fn: Callable[..., Tensor], inputs: Inputs = inputs, gy: Tensor = gy) -> Call:
        def call() -> Sequence[Tensor]:
            y = fn(*inputs)
            return y, *torch.autograd.grad(y, inputs, gy)

        return call

    found, exactly = rows(both), both(truth, exact, gy.double())
    return Case(op=op, labels=labels, providers=found, truth=exactly, baseline=found[0].name, seconds=SECONDS, **more)


def drawn(plan: Plan, layout: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    draw = torch.Generator(plan.device).manual_seed(4)

    def make(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        v = (torch.randn(*size, generator=draw, device=plan.device) * scale + shift).to(dtype)
        return (v.contiguous(memory_format=LAYOUTS[layout]) if v.dim() == 4 else v).requires_grad_()

    return make


def labels(name: str, x: Tensor, layout: str) -> dict[str, str]:
    return {"case": name, "shape": "x".join(map(str, x.shape)), "layout": layout, "dtype": str(x.dtype)[6:], "pass": "fwd+bwd"}


# A stage -------------------------------------------------------------------------------------------------------------------------


def stage(plan: Plan, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Case:
    n, c_in, hw, c_out = shape
    make, vector = drawn(plan, layout, dtype), drawn(plan, layout, torch.float32)
    x, weight = make(n, c_in, hw, hw), make(c_out, c_in, 3, 3, scale=(9 * c_in) ** -0.5)
    inputs = (x, weight, vector(c_out, scale=0.2, shift=1.0), vector(c_out, scale=0.2))
    mean, var = torch.zeros(c_out, device=plan.device), torch.ones(c_out, device=plan.device)

    def with_torch(double: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fn(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            running = (mean, var) if x.dtype != torch.float64 else (None, None)
            return F.leaky_relu(F.batch_norm(double(x, weight, None), *running, gamma, beta, True), 0.2)

        return fn

    def fused(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return ops.batch_norm_act(ops.upsample_conv2d(x, weight), mean, var, gamma, beta, act="leaky_relu", slope=0.2)

    def rows(both: Callable[..., Call]) -> list[Provider]:
        found = [Provider("published", "eager", both(with_torch(upsample_conv2d_ref)))]
        for name, fn in (("published", upsample_conv2d_ref), ("identity, BN, act", upsample_conv2d_fold)):
            found.append(provider(f"compile({name})", "compile", lambda fn=fn: both(compiled(plan, with_torch(fn)))))  # type: ignore[misc]
        found.append(Provider("ours: identity alone", "ours", both(with_torch(ops.upsample_conv2d))))
        return [*found, *ours("batch_norm_act", plan, both(fused), definition=False)]

    name = f"stage {c_in} to {c_out}"
    return case(
        "batch_norm_act", labels(name, x, layout), inputs, (n, c_out, 2 * hw, 2 * hw), rows, with_torch(upsample_conv2d_ref),
        tolerance=5e-3 if dtype == torch.float32 else 0.25,  # a LeakyReLU's kink behind a convolution
        flops=flops(16, x, c_out),
    )  # fmt: skip


def flops(taps: int, x: Tensor, c_out: int) -> int:
    """Of a convolution, forward and two gradients, for so many taps an input pixel."""
    return 3 * 2 * taps * x.numel() * c_out


def normed(plan: Plan, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Case:
    """BatchNorm and activation without the convolution, on a GPU: what the kernels reach, CUDA beside Triton."""
    vector = drawn(plan, layout, torch.float32)
    x, c = drawn(plan, layout, dtype)(*shape), shape[1]
    inputs = x, vector(c, scale=0.2, shift=1.0), vector(c, scale=0.2)
    mean, var = torch.zeros(c, device=plan.device), torch.ones(c, device=plan.device)

    def published(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        running = (mean, var) if x.dtype != torch.float64 else (None, None)
        return F.leaky_relu(F.batch_norm(x, *running, gamma, beta, True), 0.2)

    def fused(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return ops.batch_norm_act(x, mean, var, gamma, beta, act="leaky_relu", slope=0.2)

    def rows(both: Callable[..., Call]) -> list[Provider]:
        return [
            Provider("batch_norm, leaky_relu", "eager", both(published)),
            provider("compile(batch_norm, leaky_relu)", "compile", lambda: both(compiled(plan, published))),
            *ours("batch_norm_act", plan, both(fused), definition=False),
        ]

    return case(
        "batch_norm_act", labels("BN + act alone", x, layout), inputs, shape, rows, published,
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
        bytes=8 * x.numel() * x.element_size(),  # reads x twice, writes y; reads x and gy twice, writes dx
    )  # fmt: skip


# Its parts and neighbours --------------------------------------------------------------------------------------------------------


def convolution(plan: Plan, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Case:
    n, c_in, hw, c_out = shape
    make = drawn(plan, layout, dtype)
    inputs = make(n, c_in, hw, hw), make(c_out, c_in, 3, 3, scale=(9 * c_in) ** -0.5), make(c_out)

    def rows(both: Callable[..., Call]) -> list[Provider]:
        return [
            Provider("nearest + conv", "eager", both(upsample_conv2d_ref)),
            provider("compile(nearest + conv)", "compile", lambda: both(compiled(plan, upsample_conv2d_ref))),
            provider("compile(identity)", "compile", lambda: both(compiled(plan, upsample_conv2d_fold))),
            *ours("upsample_conv2d", plan, both(ops.upsample_conv2d), definition=False),
        ]

    name = f"conv {c_in} to {c_out}"
    return case(
        "upsample_conv2d", labels(name, inputs[0], layout), inputs, (n, c_out, 2 * hw, 2 * hw), rows, upsample_conv2d_ref,
        tolerance=1e-4 if dtype == torch.float32 else None, flops=flops(16, inputs[0], c_out),
    )  # fmt: skip


def stem(plan: Plan, shape: tuple[int, int, int, int], layout: str) -> Case:
    """A 7x7 stem with stride 2 on a doubled image. Its weights are frozen, as a teacher's are."""
    n, c_in, hw, c_out = shape
    make = drawn(plan, layout, torch.float32)
    x, weight = make(n, c_in, hw, hw), make(c_out, c_in, 7, 7, scale=0.1).detach()

    def on(fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: fn(x, weight.to(x.dtype), None)

    def rows(both: Callable[..., Call]) -> list[Provider]:
        return [
            Provider("nearest + stem", "eager", both(on(upsampled_stem_conv2d_ref))),
            provider("compile(nearest + stem)", "compile", lambda: both(compiled(plan, on(upsampled_stem_conv2d_ref)))),
            provider("compile(folded stem)", "compile", lambda: both(compiled(plan, on(upsampled_stem_conv2d_fold)))),
            *ours("upsampled_stem_conv2d", plan, both(on(ops.upsampled_stem_conv2d)), definition=False),
        ]

    return case(
        "upsampled_stem_conv2d", labels("stem 7x7", x, layout), (x,), (n, c_out, hw, hw), rows, on(upsampled_stem_conv2d_ref),
        tolerance=1e-4, flops=2 * 2 * 16 * x.numel() * c_out,  # forward and the gradient of the image
    )  # fmt: skip


def doubled_tanh(plan: Plan, shape: tuple[int, int, int], layout: str, dtype: torch.dtype) -> Case:
    n, c, hw = shape
    x = drawn(plan, layout, dtype)(n, c, hw, hw)
    scale, bias = (v.detach() for v in (drawn(plan, layout, torch.float32)(2, c)))

    def published(x: Tensor) -> Tensor:
        doubled = F.interpolate(x, scale_factor=2, mode="nearest")
        return torch.tanh(doubled * scale.to(x.dtype).view(-1, 1, 1) + bias.to(x.dtype).view(-1, 1, 1))

    def definition(x: Tensor) -> Tensor:
        return upsample_affine_act_ref(x, scale, bias, "tanh")

    def rows(both: Callable[..., Call]) -> list[Provider]:
        return [
            Provider("nearest, affine, tanh", "eager", both(published)),
            provider("compile(nearest, affine, tanh)", "compile", lambda: both(compiled(plan, published))),
            provider("compile(definition)", "compile", lambda: both(compiled(plan, definition))),
            *ours("upsample_affine_tanh", plan, both(lambda x: ops.upsample_affine_tanh(x, scale, bias)), definition=False),
        ]

    return case(
        "upsample_affine_tanh", labels("doubled tanh", x, layout), (x,), (n, c, 2 * hw, 2 * hw), rows, published,
        bytes=(1 + 4 + 4 + 1 + 1) * x.numel() * x.element_size(),  # reads x, writes y; reads gy and a quarter of y, writes dx
    )  # fmt: skip
