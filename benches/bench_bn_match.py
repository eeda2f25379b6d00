"""Frozen BN + ReLU with the statistics of its input and their distance to the teacher's, forward and backward.

Per layer, and for a whole teacher: ratios of single layers against torch.compile mislead (with the input as a graph input the
compiler stores a ReLU mask that it does not store inside a network), so the whole teacher is the row to quote.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import models, ops
from fastkd.nn import instrument
from fastkd.ops.bn_match.reference import bn_match_loss_ref, frozen_bn_act_stats_ref, moments_ref, wide

from ._case import Call, Case, Plan, Provider, compiled, ours, provider
from ._timing import measure_all

OP = "frozen_bn_act_stats"
LAYERS = {
    "resnet20": [(256, 16, 32, 32), (256, 32, 16, 16), (256, 64, 8, 8)],
    "resnet34": [(64, 64, 32, 32), (64, 128, 16, 16), (64, 512, 4, 4)],
}
TINY = {"resnet20": [(8, 16, 8, 8)], "resnet34": [(4, 64, 4, 4)]}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
WEIGHT = 10.0
"""Gradient of the loss: its weight in the published objectives."""


def run(plan: Plan) -> list[dict[str, Any]]:
    return measure_all(cases(plan), plan)


def cases(plan: Plan) -> Iterator[Case]:
    for dtype in plan.dtypes:
        for net, shapes in (TINY if plan.quick else LAYERS).items():
            for shape in shapes:
                for layout in LAYOUTS:
                    yield layer(plan, net, shape, layout, dtype)
        for layout in LAYOUTS:
            yield teacher(plan, layout, dtype)


def stat_distance(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The public hooks' way: mean over three dimensions, variance of a channel-first copy, two norms."""
    x = x.to(wide(x.dtype))
    rows = x.permute(1, 0, 2, 3).contiguous().flatten(1)
    return (x.mean((0, 2, 3)) - mean).norm() + (rows.var(1, unbiased=False) - var).norm()


# One layer ------------------------------------------------------------------------------------------------------------


def layer(plan: Plan, net: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Case:
    draw, c = torch.Generator().manual_seed(3), shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    mean, var = normal(c), normal(c).square() + 0.5  # running statistics, and inputs near them
    gamma, beta = 1 + 0.2 * normal(c), 0.2 * normal(c)
    x = normal(*shape) * var.sqrt().view(1, -1, 1, 1) * 1.1 + mean.view(1, -1, 1, 1) + 0.1
    scale = gamma / (var + 1e-5).sqrt()
    bias = beta - scale * mean
    vectors = [v.to(plan.device) for v in (scale, bias, mean, var, gamma, beta)]
    x = x.to(plan.device, dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    gy = normal(*shape).to(plan.device, dtype).contiguous(memory_format=LAYOUTS[layout])
    count, offsets = x.numel() // c, (0, c)
    scale, bias, mean, var, gamma, beta = vectors
    target = torch.stack([mean, var])

    def published(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.0, 1e-5)), stat_distance(x, mean, var)

    def definition(x: Tensor) -> tuple[Tensor, Tensor]:
        exact = x.dtype == torch.float64
        s, b, m, t = (v.double() if exact else v for v in (scale, bias, mean, target))
        y, sums = frozen_bn_act_stats_ref(x, s, b, m, None, "relu", 0.0)
        return y, bn_match_loss_ref(moments_ref(sums, count, m), t, offsets, 1.0, "l2")

    def public(x: Tensor) -> tuple[Tensor, Tensor]:
        y, sums = ops.frozen_bn_act_stats(x, scale, bias, mean, act="relu")
        return y, ops.bn_match_loss(ops.moments(sums, count, mean), target, offsets)

    def both(fn: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor = x, gy: Tensor = gy) -> Call:
        return lambda: with_gradient(fn(x), x, gy)

    exact = x.detach().double().requires_grad_()
    return Case(
        op=OP,
        labels={"case": net, "shape": "x".join(map(str, shape)), "layout": layout, "dtype": str(dtype)[6:], "pass": "fwd+bwd"},
        providers=[
            Provider("hooks", "eager", both(published)),
            provider("compile(definition)", "compile", lambda: both(compiled(plan, definition))),
            *ours(OP, plan, both(public)),
        ],
        truth=both(definition, exact, gy.double()),
        baseline="hooks",
        bytes=5 * x.numel() * x.element_size(),  # reads x, writes y; backward reads x and gy, writes dx
    )


def with_gradient(outputs: tuple[Tensor, Tensor], x: Tensor, gy: Tensor) -> Sequence[Tensor]:
    """Both outputs and dx, for an incoming gradient that is not ones."""
    y, loss = outputs
    (dx,) = torch.autograd.grad((y, loss), (x,), (gy, torch.full_like(loss, WEIGHT)))
    return y, loss, dx


# A whole teacher ------------------------------------------------------------------------------------------------------


def teacher(plan: Plan, layout: str, dtype: torch.dtype) -> Case:
    """ResNet-20 with the loss over all its BN layers: logits, loss, and the gradient of the images. bf16 is autocast, as in a run."""
    batch, size = (8, 8) if plan.quick else (256, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = models.build("resnet20", classes=10, channels=3, input_size=size).train()
        with torch.no_grad():
            for _ in range(2 if plan.quick else 5):  # running statistics of some images
                net(torch.randn(min(batch, 64), 3, size, size))
        images, gy = torch.rand(batch, 3, size, size) * 2 - 1, torch.randn(batch, 10)
    net = net.to(plan.device).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    net.eval().requires_grad_(False)
    x = images.to(plan.device).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    gy = gy.to(plan.device)
    inside = instrument(net, shape=(3, size, size))
    exact = instrument(copy.deepcopy(net).double())

    def reported(made: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def fn(x: Tensor) -> tuple[Tensor, Tensor]:
            trace = made(x, "bn")
            return trace.logits, ops.bn_match_loss(trace.bn, made.target, made.split)

        return fn

    def both(fn: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor = x, gy: Tensor = gy) -> Call:
        def call() -> Sequence[Tensor]:
            half = dtype != torch.float32 and x.dtype != torch.float64
            with torch.autocast(plan.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
                y, loss = fn(x)
                return with_gradient((y.to(gy.dtype), loss), x, gy)

        return call

    return Case(
        op=OP,
        labels={
            "case": "teacher resnet20",
            "shape": f"{batch}x3x{size}x{size}",
            "layout": layout,
            "dtype": str(dtype)[6:],
            "pass": "fwd+bwd",
        },
        providers=[
            Provider("hooks", "eager", both(hooked(net))),
            provider("compile(definition)", "compile", lambda: both(compiled(plan, reported(inside))), backend="reference"),
            *ours(OP, plan, both(reported(inside))),
        ],
        truth=both(reported(exact), x.detach().double().requires_grad_(), gy.double()),
        baseline="hooks",
        tolerance=5e-3 if dtype == torch.float32 else 0.25,  # 19 ReLU masks in a row; single layers are held to less
    )


def hooked(net: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The network with a hook on each BatchNorm, as published but for its weights: those are frozen here too."""
    own, terms = copy.deepcopy(net), []

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        terms.append(stat_distance(inputs[0], module.running_mean, module.running_var))

    for m in own.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(hook)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        terms.clear()
        logits = own(x)
        return logits, torch.stack(terms).sum()

    return fn
