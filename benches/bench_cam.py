"""Class activation maps: the op alone, and with a network's forward beside libraries that make such maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import models, ops
from fastkd.nn import instrument
from fastkd.ops.cam.reference import class_activation_map_ref, scale_map

from . import peers
from ._case import Call, Case, Plan, Provider, compiled, ours, provider
from ._timing import measure_all

OP = "class_activation_map"
MAPS = [(256, 64, 8, 32, 10), (64, 512, 4, 32, 100), (64, 512, 7, 112, 1000)]
"""Batch, channels, height and width of the map, of the image, classes."""
TINY = [(4, 16, 4, 8, 5)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def run(plan: Plan) -> list[dict[str, Any]]:
    return measure_all(cases(plan), plan)


def cases(plan: Plan) -> Iterator[Case]:
    for dtype in plan.dtypes:
        for size in TINY if plan.quick else MAPS:
            for layout in LAYOUTS:
                for backward in (False, True):
                    yield alone(plan, size, layout, dtype, backward)
    yield end_to_end(plan)


def product_sum(features: Tensor, weight: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """As maps are usually written: a weighted copy of the features, its sum over channels, ReLU, min-max, resize."""
    m = F.relu((weight[labels][:, :, None, None].to(features.dtype) * features).sum(1))
    m = scale_map(m.to(weight.dtype), "minmax", False)
    return F.interpolate(m[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def alone(plan: Plan, sizes: tuple[int, ...], layout: str, dtype: torch.dtype, backward: bool) -> Case:
    batch, k, hw, image, classes = sizes
    draw = torch.Generator().manual_seed(8)
    weight = (torch.randn(classes, k, generator=draw) * k**-0.5).to(plan.device)
    labels = torch.randint(classes, (batch,), generator=draw).to(plan.device)
    features = F.relu(torch.randn(batch, k, hw, hw, generator=draw)).to(plan.device, dtype).contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randn(batch, image, image, generator=draw).to(plan.device)
    features.requires_grad_(backward)
    size = (image, image)

    def definition(features: Tensor, weight: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        return class_activation_map_ref(features, weight, labels, True, "minmax", False, size, False)

    def public(features: Tensor, weight: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        return ops.class_activation_map(features, weight, labels, relu=True, norm="minmax", size=size)

    def call(fn: Callable[..., Tensor], features: Tensor = features, weight: Tensor = weight, grad: Tensor = grad) -> Call:
        def one() -> tuple[Tensor, ...]:
            m = fn(features, weight, labels, size)
            return (m, *torch.autograd.grad(m, features, grad.to(m.dtype))) if backward else (m,)

        return one

    exact = features.detach().double().requires_grad_(backward)
    traffic = features.numel() * features.element_size() * (2 if backward else 1)  # reads features; backward writes as much
    return Case(
        op=OP,
        labels={
            "case": f"{classes} classes to {image}",
            "shape": f"{batch}x{k}x{hw}x{hw}",
            "layout": layout,
            "dtype": str(dtype)[6:],
            "pass": "fwd+bwd" if backward else "fwd",
        },
        providers=[
            Provider("product and sum", "eager", call(product_sum)),
            provider("compile(definition)", "compile", lambda: call(compiled(plan, definition))),
            provider("compile(product and sum)", "compile", lambda: call(compiled(plan, product_sum))),
            *ours(OP, plan, call(public)),
        ],
        truth=call(definition, exact, weight.double(), grad.double()),
        baseline="product and sum",
        bytes=traffic + 4 * grad.numel() * (2 if backward else 1),  # and writes the maps; backward reads their gradient
    )


def end_to_end(plan: Plan) -> Case:
    """Images to maps with ResNet-20: a bare forward is a row of its own, so that what the maps add can be read off."""
    batch, size = (4, 8) if plan.quick else (64, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        net = models.build("resnet20", classes=10, channels=3, input_size=size).to(plan.device).eval()
        x = torch.randn(batch, 3, size, size).to(plan.device)
    labels = torch.arange(batch, device=plan.device) % 10
    made = instrument(net, shape=(3, size, size))
    exact = instrument(copy.deepcopy(net).double(), shape=(3, size, size))

    def maps(teacher: Any, x: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            features, (weight, _) = teacher(x).map, teacher.head
            return (ops.class_activation_map(features, weight, labels, relu=True, norm="minmax", size=(size, size), renorm=True),)

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (net(x),)

    return Case(
        op=OP,
        labels={"case": "images to maps", "shape": f"{batch}x3x{size}x{size}", "layout": "NCHW", "dtype": "float32", "pass": "fwd"},
        providers=[
            Provider("forward alone", "eager", forward, checked=False),
            *ours(OP, plan, lambda: maps(made, x)),
            provider("grad-cam", "peer", lambda: peers.grad_cam(net, x, labels)),
            provider("torchcam", "peer", lambda: peers.torchcam(net, x, labels), checked=False),
        ],
        truth=lambda: maps(exact, x.double()),
        baseline="definition",
        tolerance=1e-4,
    )
